"""Methods of five kinds through real Ray and real vLLM: they learn, and their books are right."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from examples import tiny_model
from millrace.cluster import config, jobs
from millrace.cluster.runtime import ray_cluster

GROUPS, SIZE = 8, 4
REWARD = '''
"""The share of sevens."""


def score(text):
    return text.count("7") / max(len(text), 1)
'''
# What is particular of each: shaping and a filter with refill; returns per token, a divergence in the reward and a
# reference; several optimiser steps on a batch; pairs; groups that are trained more than once.
RECIPES: dict[str, dict[str, Any]] = {
    "dapo": {},
    "reinforce_pp": {"reference": "model"},
    "decoupled_ppo": {},
    "dpo": {"reference": "model", "recipe": {"name": "dpo", "objective": {"beta": 0.05}}},
    "replay": {"loop": {"max_lag": 4}},
}

pytestmark = [pytest.mark.ray, pytest.mark.long]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("methods")
    tiny_model.build(folder / "model")
    rows = [{"prompt": f"{a} and {b}: "} for a in range(8) for b in range(8)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "sevens.py").write_text(REWARD)
    with ray_cluster():
        yield folder


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_learns_through_ray_and_vllm(recipe: str, folder: Path) -> None:
    own = RECIPES[recipe]
    loop = {"steps": 30, "groups_per_step": GROUPS, "group_size": SIZE, "max_lag": 2, **own.get("loop", {})}
    table = {
        "model": "model",
        "recipe": own.get("recipe", recipe),
        "data": {"train": "train.jsonl"},
        "rewards": {"verifier": "sevens.py:score"},
        "loop": loop,
        "sampling": {"max_tokens": 24},
        "generation": {"slots": 48},
        "learner": {"learning_rate": 2e-3, "threads": 1},
        **{key: value for key, value in own.items() if key not in ("loop", "recipe")},
    }
    run = config.of(table, root=folder, source="run.toml", name=recipe)
    found = jobs.train(run, say=lambda line: None)
    rows = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    rewards = [row["reward/mean"] for row in rows]
    assert found["ended"] == "finished" and len(rewards) == 30
    # Shaping and penalties only lower what is reported here, so that the bar is the same for all.
    assert max(rewards[-5:]) > max(0.0, rewards[0]) + 0.2
    assert found["gap_at_lag_0"] is not None and found["gap_at_lag_0"] <= 1e-5
    assert max(map(int, found["lag_histogram"])) <= loop["max_lag"]
    waste = found["waste"]
    assert waste["unaccounted"] == 0
    assert waste["generated"] == sum(many for row, many in waste.items() if row not in ("generated", "reused"))
    assert ("reused" in waste) == (recipe == "replay")
    assert (run.directory / "report.html").stat().st_size > 10_000
    assert (run.directory / "rollouts.jsonl").read_text().count("\n") >= 30
