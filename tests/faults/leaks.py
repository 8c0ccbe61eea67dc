"""What runs leave behind when they have ended: nothing.

    def test_it(...):
        with nothing_left() as census:
            job = Job.submit(config)
            ...
            os.kill(job.status().pid, signal.SIGKILL)
        # here it has been asserted, within 10 s: no process, port or shared memory of what began in the block

Everything that begins in the block inherits a mark in its environment, so that a daemon is found, too; what a marked
process starts with an empty environment is found as its descendant while they live. Ray's files in its temporary
directory are no leak.
"""

import os
import signal
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

WITHIN_S = 10.0
POLL_S = 0.1
WATCH_S = 0.25
AGAIN_S = 2.0
MARK = "MILLRACE_CENSUS"
SHARED = Path("/dev/shm")
LASTING = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")  # of the tests' own process, to its end


@dataclass(frozen=True, slots=True)
class Process:
    """One that lives: a process id may be used again, with another start."""

    pid: int
    parent: int
    start: int
    state: str = field(compare=False)

    @classmethod
    def read(cls, pid: int) -> "Process | None":
        words = _read(f"/proc/{pid}/stat").decode(errors="replace").rpartition(")")[2].split()
        return cls(pid, int(words[1]), int(words[19]), words[0]) if words and words[0] not in "ZX" else None

    def __str__(self) -> str:
        command = _command(self.pid) or f"state {self.state}"
        ports: list[int] = []
        with suppress(psutil.Error):
            sockets = psutil.Process(self.pid).net_connections(kind="inet")
            ports = sorted({each.laddr.port for each in sockets if each.status == psutil.CONN_LISTEN})
        return f"process {self.pid} of {self.parent}, {command.strip()[:200]}" + (f", ports {ports}" if ports else "")


class Census:
    """What began since it was taken."""

    def __init__(self) -> None:
        self.mark = uuid.uuid4().hex
        self._before = pids()  # that live on; where one of them has ended, its number may be used again
        self._others: set[Process] = set()  # that carry another mark: those of a test beside this one
        self._shared_before = shared()
        self._used: set[str] = set()  # shared memory that ours use, or used
        self._seen: set[str] = set()  # new shared memory, when it was last asked who uses it

    def processes(self) -> list[Process]:
        """Those that live, began since, and are ours. Asked many times a second: others are not looked at again."""
        there = pids()
        self._before &= there
        found = (Process.read(pid) for pid in there - self._before)
        now = {each.pid: each for each in found if each is not None and each not in self._others}
        marks = {pid: self._mark_of(pid) for pid in now}
        ours = {pid for pid, mark in marks.items() if mark == self.mark}
        while more := {pid for pid, each in now.items() if pid not in ours and each.parent in {*ours, os.getpid()}}:
            ours |= more
        self._others |= {now[pid] for pid, mark in marks.items() if mark and pid not in ours}
        return [now[pid] for pid in sorted(ours) if not _lasting(now[pid])]

    def shared(self) -> list[str]:
        """Shared memory that was made since, and that ours were seen to use: others on this machine make some, too."""
        new = shared() - self._shared_before
        if new - self._used:
            self._seen = new
            self._used |= {name for each in self.processes() for name in _mapped(each.pid)}
        return sorted(new & self._used)

    def watch(self, over: threading.Event) -> None:
        """Look who uses what while they live: at once when there is more of it, and now and then."""
        asked = time.monotonic()
        while not over.wait(WATCH_S):
            if shared() - self._shared_before != self._seen or time.monotonic() - asked > AGAIN_S:
                asked = time.monotonic()
                self.shared()

    def _mark_of(self, pid: int) -> str:
        words = _read(f"/proc/{pid}/environ").split(b"\0")
        return next((word.decode().partition("=")[2] for word in words if word.startswith(f"{MARK}=".encode())), "")

    def left(self) -> list[str]:
        """What is there yet, a line each."""
        return [*map(str, self.processes()), *(f"/dev/shm/{name}" for name in self.shared())]

    def wait(self, within_s: float = WITHIN_S) -> float:
        """Until nothing is left. Returns the seconds that it took.

        Raises:
            AssertionError: something is left after `within_s`; it names it. Its processes are ended then.
        """
        began = time.monotonic()
        while left := self.left():
            if time.monotonic() - began > within_s:
                self._end()
                raise AssertionError(f"left behind after {within_s:g} s:\n" + "\n".join(left))
            time.sleep(POLL_S)
        return time.monotonic() - began

    def _end(self) -> None:
        """For the tests that come after."""
        for each in self.processes():
            with suppress(ProcessLookupError):
                os.kill(each.pid, signal.SIGKILL)
        for name in self.shared():
            (SHARED / name).unlink(missing_ok=True)


@contextmanager
def nothing_left(within_s: float = WITHIN_S) -> Iterator[Census]:
    """Asserts behind the block that nothing which began in it is left; where the block failed, it ends it instead."""
    census, over = Census(), threading.Event()
    before = os.environ.get(MARK)
    os.environ[MARK] = census.mark
    watching = threading.Thread(target=census.watch, args=(over,), daemon=True)
    watching.start()
    try:
        yield census
        census.wait(within_s)
    except BaseException:
        census._end()
        raise
    finally:
        over.set()
        watching.join()
        os.environ.pop(MARK)
        if before is not None:
            os.environ[MARK] = before


def pids() -> set[int]:
    """Of all processes, and of what is left of them."""
    return {int(name) for name in os.listdir("/proc") if name.isdigit()}


def shared() -> set[str]:
    """The names in /dev/shm."""
    return set(os.listdir(SHARED)) if SHARED.is_dir() else set()


def _mapped(pid: int) -> set[str]:
    """The names in /dev/shm that a process maps."""
    lines = _read(f"/proc/{pid}/maps").decode(errors="replace").splitlines()
    return {line.rpartition(f"{SHARED}/")[2] for line in lines if f" {SHARED}/" in line}


def _lasting(process: Process) -> bool:
    return process.parent == os.getpid() and any(name in _command(process.pid) for name in LASTING)


def _command(pid: int) -> str:
    return _read(f"/proc/{pid}/cmdline").replace(b"\0", b" ").decode(errors="replace")


def _read(path: str) -> bytes:
    """Nothing, where its process has ended."""
    try:
        with open(path, "rb", buffering=0) as file:
            return file.readall()
    except OSError:
        return b""
