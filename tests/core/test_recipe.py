"""core/recipe.py: by name, by path, as a table, or one upon another; and what each mistake says."""

from pathlib import Path
from typing import Any

import pytest

from millrace.core import recipe
from millrace.core.config import Config
from millrace.core.errors import ConfigError, RecipeError
from millrace.core.recipe import ObjectiveConfig, Recipe, load


class Run(Config):
    recipe: Recipe
    steps: int = 1


def test_by_name_by_path_and_as_a_table(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text('rewards.verifier = "score.py:f"\nobjective = { advantage = "rloo" }\n')
    assert load("grpo").origin == "grpo"
    own = load("own.toml", root=tmp_path)
    assert own.origin == str(tmp_path / "own.toml")
    assert own.objective.advantage == "rloo" and own.objective.surrogate == "clip"
    assert own.rewards.verifier == f"{tmp_path}/score.py:f", "a path in a recipe starts at the recipe"
    table = load({"rewards": {"verifier": "score.py:f"}, "objective": {}}, root=Path("/data"))
    assert table.rewards.verifier == "/data/score.py:f" and table.origin == "inline"


def test_one_upon_another_changes_only_what_it_names() -> None:
    base = load("grpo")
    over = load({"name": "grpo", "rewards": {"verifier": "numeric"}, "objective": {"surrogate": {"high": 0.28}}})
    assert over.rewards.verifier == "numeric"
    assert over.objective.surrogate == {"name": "clip", "low": 0.2, "high": 0.28}
    assert over.objective.corrections == base.objective.corrections
    assert over.objective.aggregation == base.objective.aggregation
    replaced = load({"name": "grpo", "objective": {"surrogate": {"name": "cispo"}, "corrections": []}}).objective
    assert replaced.surrogate == {"name": "cispo"} and replaced.corrections == ()
    settings = load({"name": "grpo", "objective": {"advantage": {"divide_by_std": False}}}).objective.advantage
    assert settings == {"name": "grpo", "divide_by_std": False}
    whole = load({"name": "grpo", "objective": "nll"}).objective
    assert whole.loss == "nll"


def test_a_file_may_start_from_another(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('name = "b.toml"\nobjective.advantage = "rloo"\n')
    (tmp_path / "b.toml").write_text('name = "grpo"\nrewards.verifier = "score.py:f"\n')
    loaded = load(str(tmp_path / "a.toml"))
    assert loaded.objective.advantage == "rloo" and loaded.objective.aggregation == "sequence_mean"
    assert loaded.rewards.verifier == f"{tmp_path}/score.py:f"
    (tmp_path / "b.toml").write_text('name = "a.toml"\n')
    with pytest.raises(RecipeError, match=r"a.toml starts from itself: .*a.toml -> .*b.toml -> .*a.toml"):
        load(str(tmp_path / "a.toml"))


def test_a_run_may_hold_any_form_of_it() -> None:
    for given in ("grpo", {"name": "grpo"}, load("grpo"), load("grpo").model_dump(exclude_unset=True)):
        run = Run.parse({"recipe": given}, source="run.toml")
        assert run.recipe == load("grpo")


@pytest.mark.parametrize("name", recipe.names())
def test_what_is_dumped_is_read_back_as_the_same(name: str) -> None:
    loaded = load(name)
    assert Recipe.model_validate(loaded.model_dump(mode="json", exclude_unset=True)) == loaded
    assert load(loaded) == loaded


def test_a_whole_loss_is_a_name_or_a_table_with_one() -> None:
    assert ObjectiveConfig.model_validate("nll").loss == "nll"
    config = ObjectiveConfig.model_validate({"name": "dpo", "beta": 0.1, "aggregation": "sequence_mean"})
    assert config.loss == {"name": "dpo", "beta": 0.1} and config.aggregation == "sequence_mean"
    assert ObjectiveConfig.model_validate({"corrections": "icepop"}).corrections == ("icepop",)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("grop", "unknown recipe 'grop'; did you mean 'grpo'? There are a3po, cispo,"),
        ("absent.toml", "there is no recipe /data/absent.toml; by name there are a3po, cispo,"),
        ({"name": "grpo", "reward": {}}, "unknown key 'reward'; did you mean 'rewards'?"),
        ({"name": "grpo", "rewards": {"verifer": "x"}}, "rewards: unknown key 'verifer'; did you mean 'verifier'?"),
        ({"name": "grpo", "objective": {"ratoi": "x"}}, "objective: unknown key 'ratoi'; did you mean 'ratio'?"),
        ({"objective": {"surrogate": 3}}, 'objective.surrogate: a method = 3: write "name", or { name = "name",'),
        ({"objective": {"name": "nll", "ratio": "token"}}, "'nll' is a whole loss and takes no ratio"),
        ({"rewards": {}}, "objective: is missing"),
    ],
)
def test_a_mistake_says_what_to_write(given: Any, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(given, root=Path("/data"))
    assert message in str(caught.value)


def test_mistakes_are_named_from_the_runs_top() -> None:
    with pytest.raises(ConfigError, match=r"run.toml: recipe: unknown recipe 'grop'; did you mean 'grpo'\?"):
        Run.parse({"recipe": "grop"}, source="run.toml")
    with pytest.raises(ConfigError, match=r"run.toml: recipe.objective: unknown key 'ratoi'"):
        Run.parse({"recipe": {"name": "grpo", "objective": {"ratoi": "x"}}}, source="run.toml")


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text("objective = {\n")
    with pytest.raises(RecipeError, match=rf"recipe {tmp_path}/own.toml is not TOML: "):
        load("own.toml", root=tmp_path)
