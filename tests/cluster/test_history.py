"""What a run recorded, while its learner and its evaluator come and go."""

import asyncio
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from millrace.cluster.history import History
from millrace.cluster.record import Recorder
from millrace.cluster.samples import RolloutLog
from millrace.core.protocols import Quarantined, QueueStatus
from millrace.learner.report import StepNumbers, StepReport

NUMBERS = StepNumbers(loss=0.0, gradient_norm=1.0, learning_rate=0.1, entropy=1.0, metrics={}, by_lag={})
STATUS = QueueStatus(
    step=0, committed_step=0, newest_version=0, states={}, tokens={"generated": 5}, lag_histogram={}, idle={}, calls={}
)
GIVEN = {"step", "version", "numbers", "reward", "filtered", "weights", "idle_s", "samples"}
ZEROS: dict[str, Any] = {each.name: 0 for each in fields(StepReport) if each.name not in GIVEN}


def made(step: int, reward: float) -> StepReport:
    return StepReport(step=step, version=step, numbers=NUMBERS, reward=reward, filtered={}, weights=f"w{step}", **ZEROS)


class Parts:
    """A learner and a queue that answer from lists."""

    def __init__(self) -> None:
        self.steps: list[StepReport] = []
        self.told: list[dict[str, Any]] = []
        self.dead: list[Quarantined] = []

    async def reports(self, *, after: int) -> list[StepReport]:
        return self.steps[after:]

    async def events(self, *, after: int) -> list[dict[str, Any]]:
        return self.told[after:]

    async def quarantined(self, *, after: int) -> list[Quarantined]:
        return self.dead[after:]

    async def damage(self) -> list[str]:
        return ["segment 3 is short"]


@pytest.fixture
def parts() -> Parts:
    return Parts()


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def history(tmp_path: Path, said: list[str]) -> Any:
    with Recorder(tmp_path) as record:
        yield History(record, RolloutLog(tmp_path, lambda: None), say=said.append)  # type: ignore[arg-type, return-value]


def collect(history: History, parts: Parts) -> Any:
    return asyncio.run(history.collect(parts, None, parts, replace(STATUS, quarantined=len(parts.dead))))


def rows(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_each_step_is_recorded_once(history: History, parts: Parts, tmp_path: Path) -> None:
    parts.steps = [made(1, 0.1)]
    assert [report.step for report in collect(history, parts)] == [1]
    parts.steps.append(made(2, 0.2))
    assert [report.step for report in collect(history, parts)] == [2]
    assert collect(history, parts) == []
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]
    assert rows(tmp_path)[1]["weights"] == "w2"


def test_what_a_restarted_learner_makes_again_replaces_what_was_recorded(
    history: History, parts: Parts, tmp_path: Path
) -> None:
    parts.steps = [made(step, 0.1) for step in (1, 2, 3, 4)]
    collect(history, parts)
    history.lost("learner")
    parts.steps = [replace(made(3, 0.7), version=9)]
    collect(history, parts)
    parts.steps.append(replace(made(4, 0.8), version=10))
    collect(history, parts)
    assert [(row["step"], row["reward/mean"]) for row in rows(tmp_path)] == [(1, 0.1), (2, 0.1), (3, 0.7), (4, 0.8)]
    assert [row["reward/mean"] for row in history.rows] == [0.1, 0.1, 0.7, 0.8]


def test_reports_that_a_killed_learner_took_along_come_from_its_checkpoint(
    history: History, parts: Parts, tmp_path: Path
) -> None:
    parts.steps = [made(1, 0.1), made(2, 0.2)]
    collect(history, parts)
    history.lost("learner")
    parts.steps = [made(2, 0.9), made(3, 0.3), made(4, 0.4)]  # of its checkpoint: the second is known already
    collect(history, parts)
    assert [(row["step"], row["reward/mean"]) for row in rows(tmp_path)] == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)]


def test_a_restart_of_another_component_repeats_nothing(history: History, parts: Parts, tmp_path: Path) -> None:
    parts.steps = [made(1, 0.1)]
    collect(history, parts)
    history.lost("generation-0")
    collect(history, parts)
    assert len(rows(tmp_path)) == 1


def test_events_of_the_learner_are_told_once_for_each_incarnation(
    history: History, parts: Parts, tmp_path: Path, said: list[str]
) -> None:
    parts.told = [{"kind": "step skipped", "step": 3, "groups": ["4/0"], "why": "the loss is nan"}]
    collect(history, parts)
    collect(history, parts)
    history.lost("learner")
    parts.told = [{"kind": "checkpoint refused", "why": "digest"}]
    collect(history, parts)
    assert [event["kind"] for event in rows(tmp_path, "events.jsonl")] == ["step skipped", "checkpoint refused"]
    assert said[0] == "step skipped: step 3; groups ['4/0']; why the loss is nan"


def test_workers_that_a_prompt_crashed_are_not_blamed(history: History, parts: Parts, tmp_path: Path) -> None:
    workers = ("generation-0", "generation-1", "generation-0")
    facts: dict[str, Any] = {"draw": 7, "attempt": 2, "prompt": "train:3", "times": 3, "traceback": "signal 11"}
    parts.dead = [Quarantined(cause="crashed", workers=workers, **facts)]
    collect(history, parts)
    assert history.blamed() == list(workers)
    assert history.blamed() == []
    parts.dead.append(Quarantined(cause="engine", workers=("generation-0",), **facts))
    collect(history, parts)
    assert history.blamed() == []
    told = rows(tmp_path, "events.jsonl")
    assert [(event["kind"], event["cause"]) for event in told] == [
        ("quarantined", "crashed"),
        ("quarantined", "engine"),
    ]
    assert told[0]["traceback"] == "signal 11"


def test_damage_is_told_once(history: History, parts: Parts, tmp_path: Path) -> None:
    asyncio.run(history.tell_damage(parts))
    asyncio.run(history.tell_damage(parts))
    assert [event["what"] for event in rows(tmp_path, "events.jsonl")] == ["segment 3 is short"]


def test_what_hangs_or_is_made_anew_does_not_hold_back_what_the_others_report(
    history: History, parts: Parts, tmp_path: Path
) -> None:
    class Silent:
        async def results(self, *, after: int) -> None:
            await asyncio.Event().wait()

    class Dying(Silent):
        async def results(self, *, after: int) -> None:
            raise ConnectionError("held-out is gone")

    for number, held_out in enumerate((Silent(), Dying()), 1):
        parts.steps = [made(step, 0.1) for step in range(1, number + 1)]
        fresh = asyncio.run(history.collect(parts, held_out, parts, STATUS, patience_s=0.01))
        assert [report.step for report in fresh] == [number]
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]


def test_a_full_disk_is_told_once_and_so_is_its_end(
    history: History, parts: Parts, tmp_path: Path, said: list[str]
) -> None:
    full = {"queue": "ledger.sqlite cannot be written: make room on that disk"}
    for idle in ({}, full, full, {}, {}):
        asyncio.run(history.collect(parts, None, parts, replace(STATUS, idle=idle)))
    assert [event["kind"] for event in rows(tmp_path, "events.jsonl")] == ["disk full", "disk has room"]
    assert "make room on that disk. Until then the run waits" in said[0]


def test_the_last_words_of_a_lost_learner_are_not_counted_as_its_successors(history: History, parts: Parts) -> None:
    class Lost(Parts):
        async def reports(self, *, after: int) -> list[StepReport]:
            history.lost("learner")
            return [made(1, 0.1)]

    assert asyncio.run(history.collect(Lost(), None, parts, STATUS)) == []
    parts.steps = [made(1, 0.1), made(2, 0.2)]
    assert [report.step for report in collect(history, parts)] == [1, 2]
