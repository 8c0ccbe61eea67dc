"""A tracker that fails, hangs or cannot be started: the run goes on, and says it once."""

import asyncio
import json
import time
from collections.abc import Mapping
from pathlib import Path
from threading import Event, current_thread, main_thread
from typing import Any

import pytest

from millrace.cluster.record import Recorder
from millrace.cluster.snapshot import Snapshot, Status
from millrace.cluster.trackers import running
from millrace.cluster.trackers.running import TRIES, Trackers, tracked
from millrace.core.catalogue import Spec, split
from millrace.core.errors import ConfigError

MOMENT = Status(id="/runs/x", state="running", name="x")
ENDED = Status(id="/runs/x", state="finished", name="x")


class Recording:
    """Keeps what it is told; a subclass misbehaves."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Any]] = []

    def start(self, config: Mapping[str, Any], directory: Path) -> str:
        self.told.append(("start", dict(config)))
        return "here"

    def step(self, step: int, row: Mapping[str, Any]) -> None:
        self.told.append(("step", step))

    def evaluated(self, step: int, row: Mapping[str, Any]) -> None:
        self.told.append(("evaluated", step))

    def moment(self, status: Status) -> None:
        self.told.append(("moment", status.state))

    def finish(self, status: Status) -> None:
        self.told.append(("finish", status.state))


class Failing(Recording):
    def step(self, step: int, row: Mapping[str, Any]) -> None:
        super().step(step, row)
        raise ConnectionError(f"no route to host at {step}")


class Refusing(Recording):
    def start(self, config: Mapping[str, Any], directory: Path) -> str:
        raise PermissionError("no account")


class Hanging(Recording):
    def __init__(self) -> None:
        super().__init__()
        self.let_go = Event()

    def step(self, step: int, row: Mapping[str, Any]) -> None:
        assert current_thread() is not main_thread()
        self.let_go.wait(60)


Started = tuple[Trackers, list[tuple[str, dict[str, Any]]]]


def started(monkeypatch: pytest.MonkeyPatch, **trackers: Recording) -> Started:
    def made(spec: Spec) -> tuple[str, Recording]:
        name, _ = split(spec, slot="tracking")
        return name, trackers[name]

    events: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(running, "tracker", made)
    found = Trackers(list(trackers), event=lambda kind, **facts: events.append((kind, facts)))
    return found, events


def test_a_tracker_is_told_everything_in_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    one = Recording()
    trackers, events = started(monkeypatch, one=one)
    assert trackers.start({"model": "m"}, tmp_path) == ["one: here"]
    trackers.row(1, {"step": 1, "reward/mean": 0.5})
    trackers.row(1, {"step": 1, "held_out": {"step": 1, "mean": 0.5}})
    trackers.moment(MOMENT)
    trackers.finish(ENDED)
    assert one.told == [
        ("start", {"model": "m"}),
        ("step", 1),
        ("evaluated", 1),
        ("moment", "running"),
        ("finish", "finished"),
    ]
    assert events == [("tracking", {"tracker": "one", "where": "here"})]


def test_a_failure_is_an_event_once_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bad, good = Failing(), Recording()
    trackers, events = started(monkeypatch, bad=bad, good=good)
    trackers.start({}, tmp_path)
    for step in range(TRIES + 3):
        trackers.row(step, {"step": step})
    trackers.finish(ENDED)
    assert [(kind, facts["tracker"]) for kind, facts in events[2:]] == [
        ("tracker failed", "bad"),
        ("tracker dropped", "bad"),
    ]
    assert "no route to host at 0" in events[2][1]["cause"]
    assert [what for what, _ in good.told].count("step") == TRIES + 3
    assert [what for what, _ in bad.told].count("step") == TRIES, "dropped after as many tries"
    assert bad.told[-1] == ("finish", "finished"), "and still told of the end"


def test_a_tracker_that_recovers_is_not_dropped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bad = Failing()
    trackers, events = started(monkeypatch, bad=bad)
    trackers.start({}, tmp_path)
    for step in range(TRIES + 3):
        trackers.row(step, {"step": step})
        trackers.moment(MOMENT)  # which succeeds
    trackers.finish(ENDED)
    assert [what for what, _ in bad.told].count("step") == TRIES + 3
    assert [kind for kind, _ in events] == ["tracking", "tracker failed"]


def test_a_tracker_that_hangs_holds_nobody_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(running, "FINISH_S", 0.2)
    monkeypatch.setattr(running, "WAITING_CALLS", 4)
    stuck, good = Hanging(), Recording()
    trackers, events = started(monkeypatch, stuck=stuck, good=good)
    trackers.start({}, tmp_path)
    for step in range(20):
        trackers.row(step, {"step": step})
        while len(good.told) < step + 2:
            time.sleep(0.001)
    trackers.moment(MOMENT)
    assert "4 calls wait for stuck" in events[-1][1]["cause"]
    trackers.finish(ENDED)
    stuck.let_go.set()
    assert [(kind, facts["tracker"]) for kind, facts in events[2:]] == [("tracker behind", "stuck")]
    assert good.told[-1] == ("finish", "finished")


def test_one_that_cannot_be_started_refuses_the_run_and_ends_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    good = Recording()
    trackers, _ = started(monkeypatch, good=good, bad=Refusing())
    with pytest.raises(ConfigError, match="tracking bad: starting it raised PermissionError: no account"):
        trackers.start({}, tmp_path)
    assert good.told[-1] == ("finish", "failed")


@pytest.mark.parametrize(
    ("raised", "state", "ended"),
    [
        (None, "running", "finished"),
        (None, "stopping", "stopped"),
        (ConfigError("it broke"), "running", "failed"),
        (asyncio.CancelledError(), "running", "stopped"),
    ],
)
def test_a_tracked_run_tells_rows_moments_and_how_it_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, raised: BaseException | None, state: str, ended: str
) -> None:
    one, said = Recording(), list[str]()
    monkeypatch.setattr(running, "tracker", lambda spec: (spec, one))
    snapshot = Snapshot(tmp_path, name="x")

    async def run(record: Recorder) -> None:
        async with tracked(["one"], {"model": "m"}, record=record, snapshot=snapshot, say=said.append):
            record.metrics(1, {"reward/mean": 0.5})
            snapshot.update(state=state)
            if raised is not None:
                raise raised
        record.metrics(2, {"reward/mean": 0.5})

    with Recorder(tmp_path) as record:
        try:
            asyncio.run(run(record))
        except (ConfigError, asyncio.CancelledError) as caught:
            assert caught is raised or isinstance(raised, asyncio.CancelledError)
    assert one.told == [("start", {"model": "m"}), ("step", 1), ("moment", state), ("finish", ended)]
    assert said == ["tracking one: here"]
    events = [json.loads(line)["kind"] for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert events == ["tracking"]
