"""What ends a run from outside: signals, orders in its directory, the end of whoever it is attached to.

Light to import: it listens before anything else does.
"""

import asyncio
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from millrace.cluster import run_directory
from millrace.cluster.snapshot import Snapshot, cut_short

POLL_S = 0.25
INTERRUPTED = 130
ENDING = (signal.SIGINT, signal.SIGTERM)
STOP_S = 7.5  # that a run which was told to end in order may take, before it is told to end at once
UNWIND_S = 1.0  # that one which was told to end at once may take, before it is left behind
LEAVE_S = 0.5  # and whatever comes after it: the report, the end of Ray


class Brake:
    """Ends a run from any thread: in order when first asked, at once when asked again or told so."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._act: Callable[[bool], None] | None = None
        self._asked: list[bool] = []
        self.ends_s = float("inf")  # on the monotonic clock: when the process should be gone

    def pull(self, *, now: bool) -> None:
        """Ask. What is asked before the run has begun, it hears when it begins."""
        self.end_within(UNWIND_S if now or self._asked else STOP_S + UNWIND_S + LEAVE_S)
        self._asked.append(now)
        if self._loop is not None and self._act is not None:
            with suppress(RuntimeError):  # the loop has ended meanwhile
                self._loop.call_soon_threadsafe(self._act, now)

    def end_within(self, seconds: float) -> None:
        """The process should not be here any longer than that."""
        self.ends_s = min(self.ends_s, time.monotonic() + seconds)

    @property
    def connected(self) -> bool:
        """Whether a run listens."""
        return self._act is not None

    def connect(self, act: Callable[[bool], None]) -> None:
        """From the loop of the run: `act` gets what is asked."""
        self._loop, self._act = asyncio.get_running_loop(), act
        for now in self._asked:
            act(now)


def stopped(snapshot: Snapshot, say: Callable[[str], None]) -> None:
    """A run that did not end by itself leaves word of what it left undone."""
    if not snapshot.status.ended:
        note = cut_short(snapshot.status)
        snapshot.update(state="stopped", eta_s=None, waits={}, note=note)
        say(note)


@dataclass(frozen=True, slots=True)
class Driven:
    """The run, as far as it takes to end it."""

    snapshot: Snapshot
    brake: Brake
    say: Callable[[str], None]


class Ears(threading.Thread):
    """Hears signals, the order to stop, and the end of the process that the run is attached to.

    A thread of its own, because the main one may be in the middle of anything: it loads a library, starts Ray, writes
    the report. What has not ended in time it ends.
    """

    def __init__(self, link: socket.socket) -> None:
        super().__init__(name="ears", daemon=True)
        self._link, self._attached = link, False
        self._heard: str | None = None  # the last order in words
        self._run: Driven | None = None
        self._signals, wake = socket.socketpair()
        wake.setblocking(False)
        for number in ENDING:
            signal.signal(number, lambda number, frame: None)  # the system writes its number all the same:
        signal.set_wakeup_fd(wake.detach(), warn_on_full_buffer=False)

    def listen_for(self, run: Driven, *, attached: bool) -> None:
        """From now on there is something to end in order."""
        self._run, self._attached = run, attached

    def run(self) -> None:
        while True:
            checking = self._run is None
            watched = [self._signals, *([self._link] if self._attached or checking else [])]
            ready = select.select(watched, [], [], POLL_S)[0]
            for number in self._signals.recv(64) if self._signals in ready else b"":
                if number in ENDING:
                    self._order(now=False)
            if checking:
                if self._link in ready:
                    self._look_for_the_submitter()
                continue
            run = self._run
            assert run is not None
            if self._link in ready:
                self._attached = False  # it never says anything, so it has ended
                if self._heard is None:
                    run.say("the process that started this run has ended")
                    self._order(now=False)
            order = run_directory.ordered_to_stop(Path(run.snapshot.status.id))
            if order is not None and order != self._heard:
                self._heard = order
                self._order(now=order == "now")
            if time.monotonic() > run.brake.ends_s:
                _end(run)

    def _look_for_the_submitter(self) -> None:
        """One that ends before it had its answer knows of no run; after that it may end as it likes."""
        closed = False
        with suppress(BlockingIOError):  # the request, which is not for here, was read just now
            closed = not self._link.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        if closed and self._run is None:  # asked in this order: there is a run before there is an answer
            os._exit(INTERRUPTED)
        time.sleep(POLL_S)

    def _order(self, *, now: bool) -> None:
        if self._run is None:
            os._exit(INTERRUPTED)  # still checking: nothing has begun
        self._run.brake.pull(now=now)
        if not self._run.brake.connected and not self._run.snapshot.status.ended:
            _end(self._run)  # Ray is starting; its guard ends it


def _end(run: Driven) -> None:
    """End what does not end by itself. The guard sees to what it has started."""
    stopped(run.snapshot, run.say)
    os._exit(INTERRUPTED)
