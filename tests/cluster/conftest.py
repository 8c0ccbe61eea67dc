"""Whole runs in this process, on a table that knows digits: a second each."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from millrace.cluster import config
from millrace.cluster.config import RunConfig

Table = dict[str, Any]
MakeRun = Callable[..., RunConfig]

QUICK: Table = {
    "recipe": "grpo",
    "loop": {"steps": 12, "groups_per_step": 16, "group_size": 8, "max_lag": 1},
    "sampling": {"max_tokens": 4},
    "rewards": {"verifier": "exact", "poll_s": 0.1, "heartbeat_s": 0.1},
    "generation": {
        "engine": {"name": "table"},
        "slots": 64,
        "heartbeat_s": 0.1,
        "linger_s": 0.02,
    },
    "learner": {"learning_rate": 0.5, "threads": 1},
    "evaluation": {"every": 4},
}


@pytest.fixture(scope="session")
def make_run_in(digit_model: Path, copy_task: dict[str, Path]) -> MakeRun:
    """A run by directory and name; sections given are laid over the quick ones."""

    def make(root: Path, name: str = "run", **sections: Any) -> RunConfig:
        table: Table = {"model": str(digit_model), "data": {key: str(path) for key, path in copy_task.items()}, **QUICK}
        for key, value in sections.items():
            table[key] = {**table[key], **value} if isinstance(value, dict) and key in table else value
        return config.of(table, root=root, source="run.toml", name=name)

    return make


@pytest.fixture
def make_run(make_run_in: MakeRun, tmp_path: Path) -> MakeRun:
    """The same, in the test's own directory."""
    return partial(make_run_in, tmp_path)
