"""A run to which something is done: started as a job, watched through its files, hit, and seen to its end.

with nothing_left():
    scene = Scene.start(config)
    scene.until(step=2)
    hit = scene.kill("generation-0")
    ended = scene.end()
invariants.hold(ended, hits=[hit])
"""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, TypeVar

import psutil

from millrace.cluster import jobs, run_directory, snapshot
from millrace.cluster.config import RunConfig
from millrace.cluster.job import Job
from millrace.cluster.snapshot import Status
from millrace.core import failpoint
from millrace.core.errors import DeadlineError, MillraceError

T = TypeVar("T")
Row = Mapping[str, Any]

WAIT_S = 180.0  # for what takes seconds on a machine with nothing else to do
POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Hit:
    """What was done to a component, and when."""

    component: str
    pid: int
    signal: signal.Signals
    time_s: float  # unix


@dataclass(frozen=True)
class Ended:
    """What a run left behind."""

    directory: Path
    status: Status
    events: list[Row]
    rows: list[Row]  # of metrics.jsonl
    said: list[str]  # lines of progress.log
    result: Row | None

    @classmethod
    def of(cls, directory: Path) -> Self:
        """Read when nobody runs in it any more."""
        status = snapshot.read(directory)
        assert status is not None, f"{directory} has no {snapshot.FILE}"
        log, result = directory / run_directory.PROGRESS_LOG, directory / run_directory.RESULT
        return cls(
            directory,
            status,
            lines(directory / run_directory.EVENTS),
            lines(directory / run_directory.METRICS),
            log.read_text().splitlines() if log.exists() else [],
            json.loads(result.read_text()) if result.exists() else None,
        )

    @property
    def steps(self) -> list[Row]:
        """The rows of optimiser steps."""
        return [row for row in self.rows if "held_out" not in row]

    def told(self, kind: str, **facts: Any) -> list[Row]:
        """Events of a kind that say this."""
        return [each for each in self.events if each["kind"] == kind and facts.items() <= each.items()]


class Scene:
    """A run under way."""

    def __init__(self, job: Job, marker: Path | None = None) -> None:
        self.job = job
        self.directory = job.directory
        self._marker = marker

    @classmethod
    def start(
        cls, config: RunConfig, *, at: str = "", local: bool = False, resume: bool = False, address: str | None = None
    ) -> Self:
        """Begin it.

        Args:
            at: a failpoint of its processes: `learner.step.before@3=kill`.
        """
        marker = Path(config.runs) / f"{config.name}.{at.partition('=')[0]}.hit" if at else None
        if marker is not None:
            marker.parent.mkdir(parents=True, exist_ok=True)
        with _armed(f"{at}:{marker}" if at else ""):
            if resume:
                job = Job.resume(config.directory, address, local=local)
            else:
                job = Job.submit(config, address, local=local)
        return cls(job, marker)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        if failure[0] is not None and not self.job.ended:
            self.job.stop(now=True)
            self._wait(lambda: self.job.ended, "its end")

    def until(self, condition: Callable[[Status], T] | None = None, *, step: int = 0, what: str = "") -> T:
        """Wait until its status shows something, or a number of steps."""
        found = self._wait(
            lambda: (condition or (lambda status: status.step >= step))(self.job.status()),  # type: ignore[return-value]
            what or f"step {step}",
        )
        return found  # type: ignore[return-value]

    def serving(self, component: str) -> int:
        """The process of a component, once it serves."""

        def pid(status: Status) -> int:
            found = status.components.get(component)
            return found["pid"] if found is not None and found["state"] == "serving" else 0

        return self.until(pid, what=f"{component} to serve")

    def child(self, component: str, command: str) -> int:
        """The process below a component whose command line holds this."""
        pid = self.serving(component)

        def below() -> int:
            for each in psutil.Process(pid).children(recursive=True):
                if command in " ".join([each.name(), *each.cmdline()]):
                    return each.pid
            return 0

        return self._wait(below, f"a process {command} of {component}")

    def kill(self, component: str, pid: int = 0) -> Hit:
        return self.send(signal.SIGKILL, component, pid)

    def stop(self, component: str, pid: int = 0) -> Hit:
        return self.send(signal.SIGSTOP, component, pid)

    def cont(self, hit: Hit) -> None:
        """Let a stopped process go on; by now it may have been ended."""
        with suppress(ProcessLookupError):
            os.kill(hit.pid, signal.SIGCONT)

    def send(self, number: signal.Signals, component: str, pid: int = 0) -> Hit:
        """A signal to a component's process, or to another one of it."""
        pid = pid or self.serving(component)
        hit = Hit(component, pid, number, time.time())
        os.kill(pid, number)
        return hit

    def reached(self, role: str) -> Hit:
        """Wait until the failpoint was reached, and the loss noticed: the event says which one of the role it was."""
        marker = self._marker
        assert marker is not None, "this scene has no failpoint"
        self._wait(marker.exists, f"{marker.name} to be reached")
        time_s = marker.stat().st_mtime
        loss = self._event("lost", role, time_s)
        return Hit(loss["component"], 0, signal.SIGKILL, time_s)

    def lost(self, hit: Hit) -> Row:
        """The event of the loss that a hit caused."""
        return self._event("lost", hit.component, hit.time_s)

    def back(self, hit: Hit) -> Row:
        """The event that it serves again."""
        return self._event("serving", hit.component, hit.time_s)

    def end(self, within_s: float = WAIT_S) -> Ended:
        """Open the gate of a paced run, and wait for the end; a failure is in its status."""
        gate_of(self.directory).touch()
        try:
            self.job.wait(within_s)
        except DeadlineError:
            if not self.job.ended:
                raise AssertionError(f"the run did not end.{self._now()}") from None
        except MillraceError:
            pass
        return Ended.of(self.directory)

    def _event(self, kind: str, component: str, since_s: float) -> Row:
        def found() -> Row | None:
            for each in lines(self.directory / run_directory.EVENTS):
                known = each["kind"] == kind and each.get("component", "").startswith(component)
                if known and each["time_s"] >= since_s:
                    return each
            return None

        return self._wait(found, f"{component} to be told as {kind}")  # type: ignore[return-value]

    def _wait(self, condition: Callable[[], T], what: str) -> T:
        deadline = time.monotonic() + WAIT_S
        while True:
            over = self.job.ended  # asked first: what it did before its end is seen after it
            if found := condition():
                return found
            assert not over, f"the run ended before {what}.{self._now()}"
            assert time.monotonic() < deadline, f"waited {WAIT_S:g} s for {what}.{self._now()}"
            time.sleep(POLL_S)

    def _now(self) -> str:
        status = self.job.status()
        log = self.directory / run_directory.PROGRESS_LOG
        said = log.read_text().splitlines()[-8:] if log.exists() else []
        return "\n".join(["", str(status), *said])


def gate_of(directory: Path) -> Path:
    """The file that lets a paced run go as fast as it can."""
    return directory.with_suffix(".gate")


def run_here(config: RunConfig) -> Ended:
    """A whole run in this process, however it ends; a failure is in its status."""
    said: list[str] = []
    with suppress(MillraceError):
        jobs.train(config, local=True, say=said.append)
    return replace(Ended.of(config.directory), said=said)


def lines(path: Path) -> list[Row]:
    """The whole lines of a file that may still grow."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_bytes().rpartition(b"\n")[0].splitlines()]


@contextmanager
def _armed(text: str) -> Iterator[None]:
    """What is started in the block inherits the failpoint."""
    if text:
        os.environ[failpoint.VARIABLE] = text
    try:
        yield
    finally:
        os.environ.pop(failpoint.VARIABLE, None)
