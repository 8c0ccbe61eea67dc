"""Every recipe that comes with us trains on the table engine, in process, and learns."""

import re
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from millrace.cluster import config, jobs
from millrace.core.recipe import load, names
from millrace.learner.objective import Objective
from millrace.rewards.shaping import Shaping

RECIPES = Path(__file__).parents[2] / "recipes"
STEPS = 10


# What a method needs otherwise than the others, and why.
LOOP: dict[str, dict[str, int]] = {
    # The fourth use of a group is three steps after the first; and a batch's reward is that of its older groups too.
    "replay": {"max_lag": 3, "steps": 14},
    # Its baseline is a constant: at first nine of ten rollouts only say what not to do, which teaches more slowly.
    "topr": {"steps": 14},
}
# Settings of a recipe that are made for runs of thousands of steps.
CHANGES: dict[str, dict[str, Any]] = {
    "grpo_snapshot": {"objective": {"reference": {"every": 4}}},
}


def asks(recipe: str) -> frozenset[str]:
    loaded = load(recipe)
    objective = Objective.of(loaded.objective, models=frozenset({"reference"}))
    return objective.asks | objective.asks_of_groups | Shaping.of(loaded.rewards).words


def run(root: Path, base: Path, task: dict[str, Path], recipe: str) -> Any:
    table: dict[str, Any] = {
        "model": str(base),
        "data": {name: str(path) for name, path in task.items()},
        "recipe": {"name": recipe, **CHANGES[recipe]} if recipe in CHANGES else recipe,
        "loop": {"steps": STEPS, "groups_per_step": 16, "group_size": 8, "max_lag": 1} | LOOP.get(recipe, {}),
        "sampling": {"max_tokens": 4},
        "rewards": {"poll_s": 0.1, "heartbeat_s": 0.1},
        "generation": {"engine": "table", "slots": 64, "heartbeat_s": 0.1, "linger_s": 0.02},
        "learner": {"learning_rate": 0.5, "threads": 1},
        "supervised": {"learning_rate": 0.3, "epochs": 6, "batch_rows": 20, "threads": 1},
        "evaluation": {"every": LOOP.get(recipe, {}).get("steps", STEPS)},
    }
    if "reference_logprob_N" in asks(recipe):
        table["reference"] = str(base)
    return config.of(table, root=root, source="run.toml", name=recipe)


RL = [name for name in names() if load(name).rewards.verifier is not None]


def test_every_file_is_a_recipe_and_is_tried() -> None:
    assert {path.stem for path in RECIPES.glob("*.toml")} == set(names()) == {*RL, "sft"}


@pytest.mark.parametrize("recipe", RL)
def test_it_learns(recipe: str, tmp_path: Path, digit_model: Path, copy_task: dict[str, Path]) -> None:
    found = jobs.train(run(tmp_path, digit_model, copy_task, recipe), local=True, say=lambda line: None)
    assert found["recipe"] == recipe
    assert found["reward"]["first"] < 0.3
    assert found["reward"]["last"] > 0.6
    assert found["held_out"]["first"]["mean"] < 0.3
    assert found["held_out"]["last"]["mean"] > 0.6
    assert found["waste"]["unaccounted"] == 0
    assert found["lag_histogram"]["1"] > found["lag_histogram"]["0"]  # it learns off-policy, as the recipe is made to


def test_supervised_learning_lowers_the_loss_and_the_model_answers(
    tmp_path: Path, table_model: Path, copy_task: dict[str, Path]
) -> None:
    task = {"train": copy_task["train"]}
    found = jobs.train(run(tmp_path, table_model, task, "sft"), local=True, say=lambda line: None)
    assert found["last_loss"] < 0.5 * found["first_loss"]
    directory = tmp_path / "runs" / "sft" / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    for digit in "0123456789":
        tokens = tokenizer(f"8={digit}", return_tensors="pt", add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(model(tokens).logits[0, -1].argmax()) == digit


@pytest.mark.parametrize("recipe", names())
def test_its_header_says_whose_method_it_is(recipe: str) -> None:
    text = (RECIPES / f"{recipe}.toml").read_text()
    header = " ".join(line.removeprefix("#").strip() for line in takewhile(is_comment, text.splitlines()))
    assert re.match(r"[^:()]+: [^()]+ \([^()]+ (19|20)\d\d\), arXiv:\d{4}\.\d{5}\b", header), (
        f"recipes/{recipe}.toml begins with 'METHOD: Title (Authors year), arXiv:id', not with {header!r}"
    )


def is_comment(line: str) -> bool:
    return line.startswith("#")
