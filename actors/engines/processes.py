"""The processes of an engine: all found by one mark, watched while it lives, and ended with the process that owns it.

Also a program, of which only the standard library is loaded: `python processes.py MARK OWNER` guards an engine. It
waits for its owner's end, however that comes, ends every process that carries the mark, at any depth and at any moment
of its start, and removes their shared memory.
"""

import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

MARK = "MILLRACE_ENGINE"
TRACKER = b"from multiprocessing.resource_tracker import"
KEEP_ENVIRONMENT = "SPT_NOENV"  # else vLLM's process titles overwrite what /proc shows of the environment
LOOK_S = 1.0
STOPPED_S = 4.0  # a process that is stopped for so long will not go on
CLEANING_S = 5.0
PROC = Path("/proc")
SEGMENT, SEMAPHORE = "/dev/shm/psm_", "/dev/shm/sem.mp-"  # an engine's; semaphores may be its owner's


def marked(mark: str) -> list[int]:
    """The living processes that carry the mark; without Python's resource tracker, which cleans up after them."""
    found = []
    for entry in PROC.iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            with suppress(OSError):
                if f"{MARK}={mark}".encode() not in (entry / "environ").read_bytes().split(b"\0"):
                    continue
                if TRACKER not in (entry / "cmdline").read_bytes() and state(int(entry.name)) not in "ZX":
                    found.append(int(entry.name))
    return sorted(found)


def state(pid: int) -> str:
    """One letter: R runs, S sleeps, T is stopped, Z has ended; X is gone.

    >>> state(os.getpid())
    'R'
    """
    try:
        return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


class Processes:
    """The processes of one engine. Make it, start the engine within `starting`, then call `watch`."""

    def __init__(self) -> None:
        self.mark = uuid4().hex
        self._open: dict[int, int] = {}  # pid -> descriptor
        self._ending = threading.Event()
        command = [sys.executable, "-I", "-S", __file__, self.mark, str(os.getpid())]
        quiet = subprocess.DEVNULL
        self._guard = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True)

    @contextmanager
    def starting(self) -> Iterator[None]:
        """Whatever process starts meanwhile is the engine's."""
        os.environ.update({MARK: self.mark, KEEP_ENVIRONMENT: "1"})
        try:
            yield
        finally:
            for name in (MARK, KEEP_ENVIRONMENT):
                os.environ.pop(name, None)

    def watch(self, ended: Callable[[str], None]) -> None:
        """Call `ended`, in a thread, with what happened as soon as one of them ends or is stopped for long.

        The others are killed first, and their shared memory is removed: without it they compute nothing, and a
        successor needs what they hold.
        """
        for pid in marked(self.mark):
            with suppress(ProcessLookupError):
                self._open[pid] = os.pidfd_open(pid)
        if self._open:
            threading.Thread(target=self._watch, args=(ended,), name="engine-processes", daemon=True).start()

    def close(self) -> None:
        """Look no longer; what still lives is killed, and the guard goes."""
        self._ending.set()
        _end(self.mark, SEGMENT)
        self._guard.kill()
        self._guard.wait()

    def _watch(self, ended: Callable[[str], None]) -> None:
        names = {pid: _name(pid) for pid in self._open}
        segments = {path for pid in self._open for path in _segments(pid, SEGMENT)}
        poll = select.poll()
        pids = {}
        for pid, descriptor in self._open.items():
            pids[descriptor] = pid
            poll.register(descriptor, select.POLLIN)
        stopped_s = dict.fromkeys(self._open, 0.0)
        happened = ""
        while not happened and not self._ending.is_set():
            for descriptor, _ in poll.poll(LOOK_S * 1000):
                happened = f"process {pids[descriptor]} ({names[pids[descriptor]]}) has ended"
            for pid in self._open:
                stopped_s[pid] = stopped_s[pid] + LOOK_S if state(pid) == "T" else 0.0
                if stopped_s[pid] >= STOPPED_S:
                    happened = f"process {pid} ({names[pid]}) has been stopped for {STOPPED_S:g} s"
        for descriptor in pids:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            os.close(descriptor)
        if happened and not self._ending.is_set():
            _unlink(segments)
            ended(happened)


def _name(pid: int) -> str:
    with suppress(OSError):
        return (PROC / str(pid) / "comm").read_text().strip()
    return "?"


def _segments(pid: int, *prefixes: str) -> set[str]:
    """Shared memory of Python's that the process has mapped."""
    with suppress(OSError):
        paths = {line.split(maxsplit=5)[-1].strip() for line in (PROC / str(pid) / "maps").read_text().splitlines()}
        return {path for path in paths if path.startswith(prefixes)}
    return set()


def _unlink(segments: set[str]) -> None:
    for path in segments:
        with suppress(FileNotFoundError):  # Python's resource tracker was faster
            os.unlink(path)


def _end(mark: str, *prefixes: str) -> None:
    """Kill the processes with the mark, and those that they start meanwhile; then remove their shared memory."""
    segments: set[str] = set()
    deadline = time.monotonic() + CLEANING_S
    while (pids := marked(mark)) and time.monotonic() < deadline:
        for pid in pids:
            segments |= _segments(pid, *prefixes)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    _unlink(segments)


def _guard(mark: str, owner: int) -> None:
    try:
        descriptor = os.pidfd_open(owner)
    except ProcessLookupError:
        descriptor = -1
    if descriptor >= 0 and os.getppid() == owner:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        poll.poll()
    _end(mark, SEGMENT, SEMAPHORE)


if __name__ == "__main__":
    _guard(sys.argv[1], int(sys.argv[2]))
