"""Rates over a window that slides: closed values, clock given."""

from typing import Any

import pytest

from millrace.cluster.gauge import WINDOW_S, Gauge, Spent, mean_lag
from millrace.cluster.snapshot import Status
from millrace.core.protocols import QueueStatus
from millrace.learner.report import LagNumbers, LearnerStatus, StepNumbers, StepReport

COMPUTING = LearnerStatus(phase="computing", phase_s=0.5, step=0, version=0)


def queue(step: int, generated: int, **changes: Any) -> QueueStatus:
    facts: dict[str, Any] = {
        "step": step,
        "committed_step": step // 2,
        "newest_version": step,
        "states": {"scored": 3},
        "tokens": {"generated": generated, "trained": 1},
        "lag_histogram": {},
        "idle": {},
        "calls": {},
    }
    return QueueStatus(**{**facts, **changes})


def report(step: int, *, step_s: float = 2.0, wait_s: float = 0.5, lag: int = 1) -> StepReport:
    at_lag = LagNumbers(tokens=100, k3=0.0, max_gap=0.0, effective_sample_size=1.0, clip_fraction=0.0)
    numbers = StepNumbers(
        loss=0.1, gradient_norm=1.0, learning_rate=0.01, entropy=2.0, metrics={}, by_lag={lag: at_lag, 0: at_lag}
    )
    facts: dict[str, Any] = dict.fromkeys(StepReport.__slots__, 0) | {"idle_s": {}}
    return StepReport(
        **{**facts, "step": step, "numbers": numbers, "rollouts": 8, "tokens": 90, "wait_s": wait_s, "step_s": step_s}
    )


def test_rates_are_counters_over_time() -> None:
    gauge = Gauge(10.0, 1000, steps=20, max_lag=2)
    assert gauge.look(12.0, queue(0, 1000), COMPUTING, [])["eta_s"] is None
    found = gauge.look(14.0, queue(2, 1800), COMPUTING, [report(1), report(2, step_s=4.0, wait_s=2.5)])
    assert found["rates"] == {
        "generated_tokens_per_s": 200.0,
        "trained_tokens_per_s": 45.0,
        "samples_per_s": 4.0,
    }
    assert found["lag"] == {"mean": 0.5, "max": 2}
    assert found["learner"] == {"phase": "computing", "phase_s": 0.5, "wait_share": 0.5}
    assert found["eta_s"] == 18 * 4.0  # the first step also waited for the engines
    assert (found["step"], found["committed_step"], found["version"]) == (2, 1, 2)
    assert (found["idle"]["data"], found["idle"]["other"]) == (0.0, 1.0), "no cause was told"
    Status(id="x", state="running", **found)


def test_what_came_before_the_engines_were_ready_is_not_counted() -> None:
    gauge = Gauge(0.0, 0, steps=20, max_lag=2)
    gauge.begin(300.0, queue(0, 500))  # of a run that was resumed
    found = gauge.look(302.0, queue(1, 700), COMPUTING, [report(1)])
    assert found["rates"]["generated_tokens_per_s"] == 100.0
    assert found["rates"]["trained_tokens_per_s"] == 45.0


def test_the_window_slides_and_holds_some_steps_however_long_they_take() -> None:
    quick, slow = (Gauge(0.0, 0, steps=10**6, max_lag=1) for _ in range(2))
    for second in range(1, 1001):
        tokens = 1000 * min(second, 900) + 10 * max(second - 900, 0)  # the engines fall off near the end
        found = quick.look(second, queue(second, tokens), COMPUTING, [report(second)])
        long = [report(second // 100)] if second % 100 == 0 else []
        sparse = slow.look(second, queue(second // 100, tokens), COMPUTING, long)
    assert found["rates"]["generated_tokens_per_s"] == pytest.approx(10.0)
    assert found["rates"]["trained_tokens_per_s"] == pytest.approx(90.0)
    assert len(quick._counters) <= WINDOW_S + 2
    assert len(quick._reports) <= WINDOW_S + 2
    assert sparse["rates"]["trained_tokens_per_s"] == pytest.approx(0.9)  # four steps in 400 s
    assert sparse["rates"]["generated_tokens_per_s"] == pytest.approx((300 * 1000 + 100 * 10) / 400)


def test_a_learner_that_waits_is_seen_to_wait_before_its_step_ends() -> None:
    waiting = LearnerStatus(phase="waiting", phase_s=6.0, step=0, version=0)
    gauge = Gauge(0.0, 0, steps=20, max_lag=2)
    assert gauge.look(6.0, queue(0, 0), waiting, [])["learner"]["wait_share"] == 1.0
    assert gauge.look(8.0, queue(1, 0), waiting, [report(1)])["learner"]["wait_share"] == 6.5 / 8.0


def test_only_those_who_wait_are_named() -> None:
    found = Gauge(0.0, 0, steps=2, max_lag=0).look(1.0, queue(0, 0, idle={"a": "why", "b": ""}), COMPUTING, [])
    assert found["waits"] == {"a": "why"}


def test_no_time_is_no_rate() -> None:
    found = Gauge(1.0, 0, steps=2, max_lag=0).look(1.0, queue(0, 5), COMPUTING, [])
    assert set(found["rates"].values()) == {0.0}
    assert found["learner"]["wait_share"] == 0.0


def test_what_no_cause_explains_is_other() -> None:
    spent = Spent()
    assert set(spent.shares.values()) == {0.0}
    for data_s in (1.0, 3.0):
        spent.add({"time/step_s": 10.0, "time/wait_s": 5.0, "time/compute_s": 4.0, "idle/data_s": data_s})
    shares = spent.shares
    assert (shares["computing"], shares["data"], shares["judge"], shares["other"]) == (0.4, 0.2, 0.0, 0.4)
    assert sum(shares.values()) == pytest.approx(1)


def test_lag_is_the_mean_over_tokens() -> None:
    assert mean_lag([report(1, lag=2), report(2, lag=4)]) == 1.5
    assert mean_lag([]) == 0
