"""Whatever cannot work is said before anything expensive starts: the thing, the value and the way out."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from millrace.cluster import config
from millrace.cluster.plan import Plan, make_plan
from millrace.core.errors import ConfigError, DataError, MillraceError, ModelError, RecipeError, RewardError


def plan(root: Path, base: Path, task: dict[str, Path], **changes: Any) -> Plan:
    table: dict[str, Any] = {
        "model": str(base),
        "data": {name: str(path) for name, path in task.items()},
        "loop": {"steps": 2, "groups_per_step": 8, "group_size": 8},
        "sampling": {"max_tokens": 4},
        "generation": {"engine": "table", "slots": 64},
        "rewards": {"verifier": "exact"},
    }
    return make_plan(config.of({**table, **changes}, root=root, source="run.toml"))


def rows(folder: Path, *lines: dict[str, Any]) -> dict[str, Path]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"train": path}


def test_a_plan_says_what_would_run(tmp_path: Path, table_model: Path, copy_task: dict[str, Path]) -> None:
    text = str(plan(tmp_path, table_model, copy_task))
    assert "80 prompts" in text
    assert "20 prompts" in text
    assert "2 steps of 8 groups x 8 rollouts, at most 1 versions old" in text
    assert "1 x table, 64 slots of 7 tokens" in text
    assert "note" not in text
    assert not (tmp_path / "runs").exists()


def test_what_evaluation_and_learner_leave_open_follows_the_run(
    tmp_path: Path, table_model: Path, copy_task: dict[str, Path]
) -> None:
    made = plan(tmp_path, table_model, copy_task, seed=7, evaluation={"temperature": 0})
    assert (made.evaluation.max_tokens, made.evaluation.temperature) == (4, 0)
    assert made.evaluation.stop_token_ids == made.sampling.stop_token_ids == (2,)
    assert made.learner.seed == 7


Change = dict[str, Any]
CASES: dict[str, tuple[Change, type[MillraceError], str]] = {
    "missing model directory": ({"model": "./nowhere"}, ModelError, r"nowhere: no such directory; give one"),
    "missing data": (
        {"data": {"train": "trian.jsonl"}},
        DataError,
        r"trian\.jsonl: there is no such file; did you mean 'train\.jsonl'",
    ),
    "unknown verifier": ({"rewards": {"verifier": "exakt"}}, RewardError, "unknown verifier 'exakt'.*exact"),
    "reward function that is not there": (
        {"rewards": {"verifier": "mine.py:skore"}},
        RewardError,
        r"mine\.py.*skore.*score",
    ),
    "reward function that does not import": (
        {"rewards": {"verifier": "broken.py:score"}},
        RewardError,
        r"broken\.py:1: ModuleNotFoundError.*nonexistent_package",
    ),
    "reward function that asks for what the data lack": (
        {"rewards": {"verifier": "mine.py:asks"}},
        RewardError,
        "levle.*did you mean 'level'",
    ),
    "recipe that needs a reference model": (
        {"recipe": "grpo_kl"},
        RecipeError,
        r"asks for reference_logprob_N: give the run a reference model, reference = ",
    ),
    "recipe without verifier": (
        {"recipe": {"objective": {}}, "rewards": {}},
        RecipeError,
        "names no verifier: set rewards.verifier",
    ),
    "workers that would never work": (
        {"generation": {"engine": "table", "slots": 64, "workers": 3}},
        ConfigError,
        r"generation\.workers = 3 .*1 of them would never work.*64 of 192 engine slots can never be filled",
    ),
    "a filter that does not exist": (
        {"recipe": {"name": "grpo", "rewards": {"filters": ["zero_varience"]}}},
        RewardError,
        r"unknown filter 'zero_varience'; did you mean 'zero_variance'\?",
    ),
    "more optimiser steps than groups": (
        {"recipe": {"name": "grpo", "updates": {"minibatches": 99}}},
        RecipeError,
        r"updates\.minibatches = 99, but a batch has loop\.groups_per_step = 8 groups, which stay whole",
    ),
    "a divergence in the reward without a reference": (
        {"recipe": {"name": "grpo", "rewards": {"shapers": ["kl"]}}},
        RecipeError,
        r"its shapers ask for reference_logprob_N: give the run a reference model",
    ),
    "a reference that moves for nobody": (
        {"recipe": {"name": "grpo", "objective": {"reference": "ema"}}},
        RecipeError,
        r"references\.ema moves a reference model that nothing compares with",
    ),
    "groups of one for an advantage within the group": (
        {"loop": {"steps": 2, "groups_per_step": 64, "group_size": 1}},
        RecipeError,
        r"advantages\.grpo compares the rollouts of a group, but loop\.group_size = 1.*set it to 2 or more",
    ),
    "groups of one for a pair": (
        {"recipe": "dpo", "reference": "model", "loop": {"steps": 2, "groups_per_step": 64, "group_size": 1}},
        RecipeError,
        r"selections\.best_and_worst compares the rollouts of a group, but loop\.group_size = 1: nothing would be",
    ),
    "updates of a supervised run": (
        {"recipe": {"name": "sft", "updates": {"epochs": 2}}},
        RecipeError,
        r"recipe sft learns from given answers, which have no updates, .*is supervised\.epochs",
    ),
    "a reference of a supervised run": (
        {"recipe": {"name": "sft", "objective": {"penalties": ["k3"]}}, "reference": "model"},
        RecipeError,
        r"recipe sft learns from given answers, where there is no reference model: leave out",
    ),
    "weights published in another type than engines compute in": (
        {"learner": {"publish_dtype": "bfloat16"}},
        ConfigError,
        r"learner\.publish_dtype = 'bfloat16', but generation\.dtype = 'float32'.*leave publish_dtype out",
    ),
    "verdicts that come after their lease": (
        {"rewards": {"verifier": "exact", "deadline_s": 60}},
        ConfigError,
        r"rewards\.deadline_s = 60 is not below loop\.judge_lease_s = 60: .*raise loop\.judge_lease_s",
    ),
    "unknown engine": (
        {"generation": {"engine": "vlm"}},
        ConfigError,
        "generation.engine: unknown engine 'vlm'; did you mean 'vllm'",
    ),
    "prompt longer than the context": (
        {"sampling": {"max_tokens": 14}},
        DataError,
        r"line 1: .*3 tokens.*14.*16",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name: str, tmp_path: Path, table_model: Path, copy_task: dict[str, Path]) -> None:
    change, error, message = CASES[name]
    shutil.copy(copy_task["train"], tmp_path / "train.jsonl")
    (tmp_path / "mine.py").write_text(
        "def score(text, answer):\n    return 1.0\n\ndef asks(text, levle):\n    return 1.0\n"
    )
    (tmp_path / "broken.py").write_text("import nonexistent_package\n\ndef score(text): return 1.0\n")
    with pytest.raises(error, match=f"(?s){message}"):
        plan(tmp_path, table_model, copy_task, **change)


def test_a_model_without_tokenizer(tmp_path: Path, table_model: Path, copy_task: dict[str, Path]) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(table_model, bare, ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    with pytest.raises(ModelError, match=r"bare has no tokenizer that loads; save one beside it"):
        plan(tmp_path, bare, copy_task)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "the dataset is empty"),
        ([{"promt": "1=", "answer": "1"}], r"line 1: .*'prompt'.*promt"),
        ([{"prompt": 3, "answer": "1"}], r"line 1: .*'prompt'"),
        ([{"prompt": "1="}], "asks for 'answer'.*data.answer"),
    ],
)
def test_bad_rows(lines: list[dict[str, Any]], message: str, tmp_path: Path, table_model: Path) -> None:
    with pytest.raises(DataError, match=f"(?s){message}"):
        plan(tmp_path, table_model, rows(tmp_path, *lines))


def test_held_out_rows_are_checked_too(tmp_path: Path, table_model: Path, copy_task: dict[str, Path]) -> None:
    held_out = rows(tmp_path, {"prompt": "1="})["train"]
    with pytest.raises(DataError, match=r"rows\.jsonl.*answer|answer.*rows\.jsonl"):
        plan(tmp_path, table_model, {**copy_task, "held_out": held_out})


def test_slots_that_admission_can_never_fill_are_said(
    tmp_path: Path, table_model: Path, copy_task: dict[str, Path]
) -> None:
    made = plan(
        tmp_path, table_model, copy_task, loop={"steps": 2, "groups_per_step": 4, "group_size": 8, "max_lag": 0}
    )
    assert "32 of 64 engine slots can never be filled" in made.notes[0]
    assert "max_lag = 1 or groups_per_step = 8 would fill them" in str(made)


def test_a_supervised_recipe_needs_answers_and_no_verifier(
    tmp_path: Path, table_model: Path, copy_task: dict[str, Path]
) -> None:
    made = plan(tmp_path, table_model, copy_task, recipe="sft", rewards={})
    assert made.supervised
    assert "supervised" in str(made)
    with pytest.raises(DataError, match="recipe sft asks for 'answer'"):
        plan(tmp_path, table_model, rows(tmp_path, {"prompt": "1="}), recipe="sft", rewards={})


def test_a_hub_id_that_does_not_load_is_asked_for_once_and_the_directory_beside_is_named(
    tmp_path: Path, table_model: Path, copy_task: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def unreachable(name: str) -> Any:
        asked.append(name)
        raise OSError("no network")

    monkeypatch.setattr(AutoConfig, "from_pretrained", unreachable)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(table_model, "sorter")
    with pytest.raises(ModelError, match="model sortr is no directory beside .*; did you mean 'sorter'.* no network"):
        plan(tmp_path, table_model, copy_task, model="sortr")
    assert asked == ["sortr"]


def test_a_reference_that_is_not_there_is_refused(
    tmp_path: Path, table_model: Path, copy_task: dict[str, Path]
) -> None:
    with pytest.raises(ModelError, match=r"reference .*nowhere: no such directory"):
        plan(tmp_path, table_model, copy_task, recipe="grpo_kl", reference="./nowhere")


def test_a_verifier_with_settings_is_shown_as_it_reads(
    tmp_path: Path, table_model: Path, copy_task: dict[str, Path]
) -> None:
    verifier = {"name": "exact", "ignore_case": True}
    text = str(plan(tmp_path, table_model, copy_task, rewards={"verifier": verifier}))
    assert "verifier   exact(ignore_case=True), 1 x" in text


def test_a_schedule_ends_with_the_run_if_nothing_else_is_said(make_run: Any) -> None:
    plan = make_plan(make_run(recipe="ppo", learner={"schedule": "cosine"}, loop={"steps": 7}))
    assert plan.learner.decay_steps == 7 * 4
    said = make_plan(make_run(recipe="ppo", learner={"schedule": "cosine", "decay_steps": 5}))
    assert said.learner.decay_steps == 5
    supervised = make_plan(make_run(recipe="sft", rewards={}, supervised={"epochs": 3, "batch_rows": 32}))
    assert supervised.supervision is not None and supervised.supervision.decay_steps == 3 * 3  # of 80 rows


def test_a_verifier_that_fails_on_the_data_s_own_answers_is_a_note(make_run: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def score(text, answer):\n    return float(txt == answer)\n")
    (note,) = make_plan(make_run(rewards={"verifier": "mine.py:score"})).notes
    assert "of the first 4 rows' own answers 4 could not be judged" in note
    assert "NameError: name 'txt' is not defined" in note
    (tmp_path / "mine.py").write_text("def score(text, answer):\n    return float(text == answer)\n")
    assert make_plan(make_run(rewards={"verifier": "mine.py:score"})).notes == ()


def test_a_reference_that_nothing_compares_with_is_left_out_and_said(make_run: Any, digit_model: Path) -> None:
    plan = make_plan(make_run(reference=str(digit_model)))
    assert plan.reference is None
    assert plan.notes == (f"nothing in recipe grpo compares with reference = {digit_model}: it is left out",)
    plan = make_plan(make_run(recipe="grpo_kl", reference=str(digit_model)))
    assert plan.reference == str(digit_model) and plan.notes == ()
