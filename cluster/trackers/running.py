"""The trackers of one run, none of which can hold it up or end it."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any, Protocol

from millrace.cluster.record import Recorder
from millrace.cluster.snapshot import Snapshot, State, Status
from millrace.cluster.trackers.kinds import tracker
from millrace.cluster.trackers.tracker import Row, Tracker
from millrace.core.catalogue import Spec
from millrace.core.errors import ConfigError, MillraceError, boundary

WAITING_CALLS = 10_000  # that a tracker may be behind
TRIES = 5  # failures in a row after which a tracker is told nothing more
FINISH_S = 30.0  # for all of them together to send what they have

Call = Callable[[], None]


class Event(Protocol):
    """Writes a row of events.jsonl."""

    def __call__(self, kind: str, **facts: Any) -> None: ...


class Lane:
    """One started tracker, and the thread that talks to it, which may take its time."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self.name, self.tracker = name, tracker
        self.news: list[tuple[str, str]] = []  # kind and cause of events to be written; appended by both threads
        self._calls: SimpleQueue[Call | None] = SimpleQueue()
        self._last: Call | None = None
        self._failures = 0  # in a row
        self._told: set[str] = set()  # kinds of news, each said once
        self._thread = Thread(target=self._run, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def tell(self, call: Call) -> None:
        """Hand over a call; it is left out if the tracker is too far behind."""
        if self._calls.qsize() < WAITING_CALLS:
            self._calls.put(call)
        else:
            self._say("tracker behind", f"{WAITING_CALLS} calls wait for {self.name}; what is said now is left out")

    def end(self, call: Call) -> None:
        """Hand over the last call, which is made whatever went wrong before."""
        self._last = call
        self._calls.put(None)

    def join(self, timeout_s: float) -> None:
        """Wait for the last call."""
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._say("tracker behind", f"{self.name} did not take the rest within {FINISH_S:g} s; it is left out")

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            if self._failures < TRIES:
                self._make(call)
        if self._last is not None:
            self._make(self._last)

    def _make(self, call: Call) -> None:
        try:
            with boundary(f"tracker {self.name}"):
                call()
        except MillraceError as caught:
            self._failures += 1
            self._say("tracker failed", str(caught))
            if self._failures == TRIES:
                self._say("tracker dropped", f"{TRIES} failures in a row, the last: {caught}; it is told nothing more")
        else:
            self._failures = 0

    def _say(self, kind: str, cause: str) -> None:
        if kind not in self._told:
            self._told.add(kind)
            self.news.append((kind, cause))


class Trackers:
    """Tells the trackers of one run what happens. Only `start` can raise, and no call waits, but `finish`."""

    def __init__(self, specs: Sequence[Spec], *, event: Event) -> None:
        self._specs, self._event = specs, event
        self._lanes: list[Lane] = []

    def start(self, config: Mapping[str, Any], directory: Path) -> list[str]:
        """Start them all, before anything of the run.

        Args:
            config: the run's, as plain values.
            directory: the run's.
        Returns:
            A line for each, which says where it is to be found.
        Raises:
            ConfigError: one cannot be started; those before it are ended again.
        """
        found = []
        try:
            for spec in self._specs:
                name, each = tracker(spec)
                with boundary(f"tracking {name}: starting it", ConfigError):
                    where = each.start(config, directory)
                self._lanes.append(Lane(name, each))
                self._event("tracking", tracker=name, where=where)
                found.append(f"{name}: {where}")
        except ConfigError:
            self.finish(Status(id=str(directory), state="failed"))
            raise
        return found

    def row(self, step: int, row: Row) -> None:
        """A row of metrics.jsonl: a step's, or an evaluation's."""
        for lane in self._lanes:
            lane.tell(partial(lane.tracker.evaluated if "held_out" in row else lane.tracker.step, step, row))

    def moment(self, status: Status) -> None:
        """The run's status; also writes the events of what went wrong since the last time."""
        for lane in self._lanes:
            lane.tell(partial(lane.tracker.moment, status))
        self._write_news()

    def finish(self, status: Status) -> None:
        """The run has ended: wait until they have what was said, for a while."""
        deadline = time.monotonic() + FINISH_S
        for lane in self._lanes:
            lane.end(partial(lane.tracker.finish, status))
        for lane in self._lanes:
            lane.join(max(deadline - time.monotonic(), 0.0))
        self._write_news()
        self._lanes = []

    def _write_news(self) -> None:
        for lane in self._lanes:
            while lane.news:
                kind, cause = lane.news.pop(0)
                self._event(kind, tracker=lane.name, cause=cause)


@asynccontextmanager
async def tracked(
    specs: Sequence[Spec],
    config: Mapping[str, Any],
    *,
    record: Recorder,
    snapshot: Snapshot,
    say: Callable[[str], None],
) -> AsyncIterator[None]:
    """The run inside is tracked: whatever goes to metrics.jsonl and status.json is told, too, and its end.

    Args:
        config: the run's, as plain values.
    Raises:
        ConfigError: a tracker cannot be started; nothing of the run has begun.
    """
    if not specs:
        yield
        return
    trackers = Trackers(specs, event=record.event)
    for line in await asyncio.to_thread(trackers.start, config, record.directory):
        say(f"tracking {line}")
    record.listeners.append(trackers.row)
    snapshot.listeners.append(trackers.moment)
    ended: State = "stopped"
    try:
        yield
        if snapshot.status.state != "stopping":
            ended = "finished"
    except Exception:
        ended = "failed"
        raise
    finally:
        record.listeners.remove(trackers.row)
        snapshot.listeners.remove(trackers.moment)
        status = snapshot.status
        await asyncio.to_thread(trackers.finish, status if status.ended else replace(status, state=ended))
