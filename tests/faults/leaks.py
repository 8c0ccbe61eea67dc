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
from dataclasses import dataclass
from pathlib import Path

import psutil

WITHIN_S = 10.0
POLL_S = 0.1
WATCH_S = 0.25
MARK = "MILLRACE_CENSUS"
SHARED = Path("/dev/shm")
LASTING = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")  # of the tests' own process, to its end


@dataclass(frozen=True, slots=True)
class Process:
    """One that lives: a process id may be used again, with another start."""

    pid: int
    parent: int
    start: int
    state: str

    @classmethod
    def read(cls, pid: int) -> "Process | None":
        with suppress(OSError):
            words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            if words[0] not in "ZX":
                return cls(pid, int(words[1]), int(words[19]), words[0])
        return None

    def __str__(self) -> str:
        command = f"state {self.state}"
        with suppress(OSError):
            command = Path(f"/proc/{self.pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        ports: list[int] = []
        with suppress(psutil.Error):
            sockets = psutil.Process(self.pid).net_connections(kind="inet")
            ports = sorted({each.laddr.port for each in sockets if each.status == psutil.CONN_LISTEN})
        return f"process {self.pid} of {self.parent}, {command.strip()[:200]}" + (f", ports {ports}" if ports else "")


class Census:
    """What began since it was taken."""

    def __init__(self) -> None:
        self.mark = uuid.uuid4().hex
        self._before = set(living())
        self._shared_before = shared()
        self._used: set[str] = set()  # shared memory that ours use, or used

    def processes(self) -> list[Process]:
        """Those that live, began since, and are ours."""
        now = {each.pid: each for each in living() if each not in self._before}
        ours = {pid for pid in now if self._marked(pid)}
        while more := {pid for pid, each in now.items() if pid not in ours and each.parent in {*ours, os.getpid()}}:
            ours |= more
        return [now[pid] for pid in sorted(ours) if not _lasting(now[pid])]

    def shared(self) -> list[str]:
        """Shared memory that was made since, and that ours were seen to use: others on this machine make some, too."""
        new = shared() - self._shared_before
        if new - self._used:
            self._used |= {name for each in self.processes() for name in _mapped(each.pid)}
        return sorted(new & self._used)

    def watch(self, over: threading.Event) -> None:
        """Look who uses what while they live."""
        while not over.wait(WATCH_S):
            self.shared()

    def _marked(self, pid: int) -> bool:
        with suppress(OSError):
            return f"{MARK}={self.mark}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return False

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


def living() -> list[Process]:
    """All processes but zombies."""
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return [each for pid in pids if (each := Process.read(pid)) is not None]


def shared() -> set[str]:
    """The names in /dev/shm."""
    return set(os.listdir(SHARED)) if SHARED.is_dir() else set()


def _mapped(pid: int) -> set[str]:
    """The names in /dev/shm that a process maps."""
    with suppress(OSError):
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
        return {line.rpartition(f"{SHARED}/")[2] for line in lines if f" {SHARED}/" in line}
    return set()


def _lasting(process: Process) -> bool:
    with suppress(OSError):
        command = Path(f"/proc/{process.pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        return process.parent == os.getpid() and any(name in command for name in LASTING)
    return False
