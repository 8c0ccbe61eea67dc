"""A run's file: what it says, what it may leave out, and what is said about its mistakes."""

from pathlib import Path
from typing import Any

import pytest

from millrace.cluster import config
from millrace.cluster.cli import setting
from millrace.core.errors import ConfigError, RecipeError

MINIMAL = """
model = "model"
data = { train = "train.jsonl" }
loop = { steps = 2, groups_per_step = 2, group_size = 2 }
"""


def load(folder: Path, text: str, *settings: str) -> config.RunConfig:
    path = folder / "sort.toml"
    path.write_text(text)
    return config.load(path, settings=[setting(each) for each in settings])


def test_ten_lines_are_enough_and_relative_paths_start_at_the_file(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    run = load(tmp_path, MINIMAL + '[rewards]\nverifier = "mine.py:score"\n')
    assert run.name == "sort"
    assert run.model == str(tmp_path / "model")
    assert run.data.train == str(tmp_path / "train.jsonl")
    assert run.verifier == f"{tmp_path}/mine.py:score"
    assert run.directory == tmp_path / "runs" / "sort"
    assert run.recipe.origin == "grpo"


def test_references_in_the_settings_of_a_method_start_at_the_file_too(tmp_path: Path) -> None:
    run = load(
        tmp_path,
        MINIMAL,
        'rewards.verifier={ name = "isolated", verifier = "mine.py:score", deadline_s = 1.0 }',
        'rewards.shapers=[{ name = "scheduled", shaper = { name = "mine.py:shape", ends = [0.5, "x"] } }]',
    )
    assert run.verifier == {"name": "isolated", "verifier": f"{tmp_path}/mine.py:score", "deadline_s": 1.0}
    shaper = {"name": f"{tmp_path}/mine.py:shape", "ends": [0.5, "x"]}
    assert run.rewards.shapers == ({"name": "scheduled", "shaper": shaper},)


def test_a_folder_is_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is a folder; give a \.toml file"):
        config.load(tmp_path)


def test_a_name_that_is_no_directory_is_a_hub_id(tmp_path: Path) -> None:
    assert load(tmp_path, MINIMAL.replace('"model"', '"Qwen/Qwen2.5-0.5B"', 1)).model == "Qwen/Qwen2.5-0.5B"


def test_settings_replace_what_the_file_says(tmp_path: Path) -> None:
    run = load(tmp_path, MINIMAL, "loop.max_lag=4", "recipe=rloo", "sampling.temperature=0.7", "name=other")
    assert (run.loop.max_lag, run.recipe.origin, run.sampling.temperature, run.name) == (4, "rloo", 0.7, "other")


def test_what_is_saved_loads_as_the_same(tmp_path: Path) -> None:
    run = load(
        tmp_path, MINIMAL, "recipe.name=grpo", "recipe.objective.surrogate.high=0.28", "learner.learning_rate=0.1"
    )
    config.save(run, tmp_path / "config.toml")
    again = config.of_directory(tmp_path)
    assert again == run.model_copy(update={"recipe": again.recipe})
    assert again.recipe.objective == run.recipe.objective
    assert again.recipe.objective.surrogate == {"name": "clip", "low": 0.2, "high": 0.28}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINIMAL + "seeds = 1\n", r"sort\.toml: .*unknown key 'seeds'; did you mean 'seed'\?"),
        (MINIMAL.replace("steps", "stepz"), r"loop: unknown key 'stepz'; did you mean 'steps'\?"),
        (MINIMAL.replace("steps = 2", "steps = 0"), r"loop\.steps: .*greater than or equal to 1 \(got 0\)"),
        (MINIMAL.replace('model = "model"\n', ""), r"sort\.toml: model: is missing"),
        (MINIMAL + "steps = 1\n", r"top level: unknown key 'steps'; did you mean 'loop\.steps'\?"),
        (
            MINIMAL + "learning_rate = 1\n",
            r"'learning_rate'; did you mean 'learner\.learning_rate' or 'supervised\.learning_rate'\?",
        ),
        (MINIMAL + "sampling = 3\n", r"sampling: must be a table, as \{ key = value \} \(got 3\)"),
        (MINIMAL.replace('"model"', '" "', 1), r"model: is empty: give a model directory or a hub id"),
        (MINIMAL + 'name = "a/b"\n', r"name 'a/b' is not a directory's name"),
        (MINIMAL + "sampling.top_p = 0.9\n", r"sampling: unknown key 'top_p'"),
        ("model = ", r"sort\.toml: is not TOML"),
    ],
)
def test_mistakes_are_named_with_the_nearest_right_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, text)


def test_every_mistake_has_a_line_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, MINIMAL.replace("steps = 2", "steps = 0") + "sampling.temperature = -1\n")
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert all(line.startswith(str(tmp_path / "sort.toml")) for line in lines)


def test_an_unknown_recipe_is_named_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="unknown recipe 'grp'; did you mean 'grpo'"):
        load(tmp_path, MINIMAL, "recipe=grp")


def test_a_missing_file_is_named_with_the_nearest(tmp_path: Path) -> None:
    load(tmp_path, MINIMAL)
    with pytest.raises(ConfigError, match=r"there is no such file; did you mean 'sort\.toml'"):
        config.load(tmp_path / "sorts.toml")


def test_a_directory_without_a_run_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no run directory"):
        config.of_directory(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.b=1", (["a", "b"], 1)),
        ("a=true", (["a"], True)),
        ('a={ name = "x" }', (["a"], {"name": "x"})),
        ("a=some/path.jsonl", (["a"], "some/path.jsonl")),
    ],
)
def test_a_setting_is_toml_or_a_string(text: str, expected: tuple[list[str], Any]) -> None:
    assert setting(text) == expected


def test_a_setting_without_a_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="'steps' is no setting: write key=value"):
        setting("steps")


def test_fewer_crashes_than_tell_a_poison_prompt_from_its_neighbours_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"loop\.crashes = 2: .* 3 is the least"):
        load(tmp_path, MINIMAL, "loop.crashes=2")
