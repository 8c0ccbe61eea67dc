"""What slow verdicts need, and which steps are counted."""

import asyncio
from typing import Any

import pytest

from benchmarks import slow_reward, slow_verdicts


def test_judges_at_work_follow_littles_law_and_lag_the_slowest_verdict() -> None:
    assert slow_verdicts.needs(rollouts_per_s=540, steps_per_s=1.05, share=0.1, seconds=10) == {
        "verdicts_at_once": 540,
        "max_lag": 13,
    }
    assert slow_verdicts.needs(rollouts_per_s=540, steps_per_s=1.05, share=0.0, seconds=10)["verdicts_at_once"] == 0


def test_the_first_and_the_last_steps_are_left_out() -> None:
    rows = [{"step": step, "time/step_s": 9.0 if step in (1, 2, 7) else 0.25} for step in range(1, 8)]
    assert slow_verdicts.steady(rows, first=2, last=6) == 4.0


def test_shares_of_the_learners_time_are_of_the_window() -> None:
    rows = [{"step": step, "time/step_s": 2.0, "time/wait_s": 1.0 if step == 2 else 0.0} for step in (1, 2, 3)]
    assert slow_verdicts.waits(rows, first=1, last=3) == {"time/wait_s": 0.25}


def test_about_the_share_is_slow_and_always_the_same() -> None:
    texts = [str(number) for number in range(4000)]
    slow = [slow_reward.is_slow(text, "prompt", 0.1) for text in texts]
    assert 0.08 < sum(slow) / len(slow) < 0.12
    assert slow == [slow_reward.is_slow(text, "prompt", 0.1) for text in texts]


def test_the_score_does_not_depend_on_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []

    async def sleep(seconds: float) -> None:
        waited.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    scores = []
    for share in ("0", "1"):
        monkeypatch.setenv(slow_reward.SHARE, share)
        monkeypatch.setenv(slow_reward.SECONDS, "10")
        scores.append(asyncio.run(slow_reward.slow_position_match("124", "123", "sort 231=")))
    assert scores == [2 / 3, 2 / 3] and waited == [10.0]


def _given(**said: Any) -> Any:
    return type("Given", (), {"filling": 2, "steps": 3, "max_lag": 4, "groups": 8, "concurrency": 9, "drop": ()} | said)


def test_the_run_goes_on_for_the_lag_behind_what_is_measured() -> None:
    run = slow_verdicts.table(_given(stale="wait"))
    assert run["loop"]["steps"] == 9 and run["loop"]["max_lag"] == 4 and run["rewards"]["concurrency"] == 9
    assert "concurrency" not in slow_verdicts.table(_given(stale="wait", drop=("concurrency",)))["rewards"]
