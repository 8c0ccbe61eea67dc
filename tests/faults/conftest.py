"""Runs to do something to: a table model in driver processes, seconds each."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from millrace.cluster import config
from millrace.cluster.config import RunConfig
from tests.faults import rewards
from tests.faults.harness import gate_of

collect_ignore = ["poison"]  # to import it, as the search for doctests does, is to be poisoned by it

Table = dict[str, Any]
MakeRun = Callable[..., RunConfig]

SMALL: Table = {
    "recipe": "grpo",
    "loop": {"steps": 20, "groups_per_step": 8, "group_size": 4, "max_lag": 2},
    "sampling": {"max_tokens": 4},
    "rewards": {"verifier": "exact", "poll_s": 0.2, "heartbeat_s": 0.2, "linger_s": 0.02},
    "generation": {
        "engine": {"name": "table"},
        "slots": 32,
        "poll_s": 0.5,
        "heartbeat_s": 0.2,
        "linger_s": 0.02,
    },
    "learner": {"learning_rate": 0.5, "threads": 1, "checkpoint_every": 2},
    "evaluation": {"every": 10**6},
}


LONG = ("test_million.py", "test_random_kills.py", "test_torture.py", "test_resume_bits.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest begins first; the very first only computes, on cores that the others leave while they wait."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


def laid_over(table: Table, sections: Table) -> Table:
    """Sections given are laid over those of the table."""
    made = dict(table)
    for key, value in sections.items():
        both = isinstance(value, dict) and isinstance(made.get(key), dict)
        made[key] = {**made[key], **value} if both else value
    return made


@pytest.fixture(scope="session")
def make_run_in(digit_model: Path, copy_task: dict[str, Path]) -> MakeRun:
    """A run by directory and name."""

    def make(root: Path, name: str = "run", **sections: Any) -> RunConfig:
        table = {"model": str(digit_model), "data": {"train": str(copy_task["train"])}, **SMALL}
        return config.of(laid_over(table, sections), root=root, source="run.toml", name=name)

    return make


@pytest.fixture
def make_run(make_run_in: MakeRun, tmp_path: Path) -> MakeRun:
    """The same, in the test's own directory."""
    return partial(make_run_in, tmp_path)


@pytest.fixture
def paced_run(make_run: MakeRun, tmp_path: Path) -> MakeRun:
    """A run whose verdicts take `pace_s` each until its scene ends."""

    def make(name: str = "run", pace_s: float = rewards.PACE_S, **sections: Any) -> RunConfig:
        gate = str(gate_of(tmp_path / "runs" / name))
        verifier = {"name": rewards.named(rewards.paced), "gate": gate, "pace_s": pace_s}
        paced: Table = {
            "loop": {"steps": 60},
            "rewards": {"verifier": verifier},
            "generation": {"engine": {"name": "table", "token_delay_s": 0.02, "chunk_tokens": 1}},
            "supervise": {"backoff_s": 0.1},
        }
        return make_run(name, **laid_over(paced, sections))

    return make
