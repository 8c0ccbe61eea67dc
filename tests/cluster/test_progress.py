"""The lines that a person reads meanwhile."""

import re
from dataclasses import replace
from typing import Any

import pytest

from millrace.cluster.progress import count, duration, line, waits
from millrace.cluster.snapshot import Status

NUMBER_LESS = re.compile(r"\b(nan|inf|none)\b", re.IGNORECASE)


def status(**changes: Any) -> Status:
    facts: dict[str, Any] = {
        "id": "runs/x",
        "state": "running",
        "step": 2,
        "steps": 12,
        "reward": 0.15,
        "held_out": {"step": 0, "mean": 0.25},
        "lag": {"mean": 1.33, "max": 4},
        "draws": {"scored": 1},
        "rates": {"generated_tokens_per_s": 50.0, "trained_tokens_per_s": 45_000.0, "samples_per_s": 1.0},
        "learner": {"phase": "computing", "phase_s": 0.5, "wait_share": 0.25},
        "eta_s": 75.0,
    }
    return Status(**{**facts, **changes})


def test_a_line_says_how_far_how_well_how_stale_how_fast_and_who_waits() -> None:
    idle = {"generation-0": "16 rollout slots stay idle: at step 2, version 1", "reward-0": "no generated group"}
    assert line(status(waits=idle)) == (
        "step  2/12  reward 0.150  held-out 0.250 @0  lag 1.3 of 4  generate 50 tok/s  learn 45.0k tok/s  "
        "learner waits 25%, generation-0 waits: 16 rollout slots stay idle  eta 1:15"
    )


@pytest.mark.parametrize(
    "changes",
    [{"reward": None, "held_out": None, "eta_s": None}, {"held_out": {"step": 0, "mean": None}}, {"draws": {}}],
)
def test_a_line_without_news_is_a_line_all_the_same(changes: Any) -> None:
    said = line(status(**changes))
    assert " 2/12" in said
    assert not NUMBER_LESS.search(said)


def test_a_run_without_a_queue_says_nothing_of_lag_and_rates() -> None:
    assert line(replace(status(), draws={}, reward=None, held_out=None)) == "step  2/12  eta 1:15"


def test_what_should_serve_and_does_not_is_named() -> None:
    down: Any = {"state": "restarting", "pid": 1, "node": "a", "restarts": 1, "since_s": 0.0}
    said = line(status(components={"generation-0": {**down, "state": "serving"}, "generation-1": down}))
    assert "  generation-1 restarting  eta" in said and "generation-0" not in said


def test_several_engines_that_wait_are_counted() -> None:
    idle = {f"generation-{i}": "64 rollout slots stay idle: and so on" for i in range(3)}
    said = waits(status(waits=idle, learner={"phase": "waiting", "phase_s": 1.0, "wait_share": 1.7}))
    assert said == "learner waits 100%, 3 engines wait: 64 rollout slots stay idle"


def test_durations_and_counts_are_short() -> None:
    assert (duration(0), duration(59.9), duration(3600)) == ("0:00", "0:59", "1:00:00")
    assert (count(0), count(999), count(1_000), count(2.5e9)) == ("0", "999", "1.0k", "2.5G")
