"""A process beside the driver that outlives it: whatever ended the driver, nothing of its run goes on.

The driver's children inherit a mark in their environment, those of Ray among them, and so do theirs. When the driver
is gone the guard kills every process that carries the mark and all that descends from one, and removes the shared
memory that they used. Until then it holds the run directory too, so that nobody resumes beside what is still ending.

Processes of a Ray cluster that was running before do not inherit the mark: Ray ends a job's actors there. The guard
is a script of the standard library alone, a few megabytes; it needs /proc, and does nothing where there is none.
"""

import os
import select
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

RUN = "MILLRACE_RUN"  # the run directory, for whoever looks at a process
MARK = "MILLRACE_GUARD"  # one incarnation's own
PLAIN = {"SPT_NOENV": "1"}  # who sets its title otherwise does so over its environment
PROCESSES = Path("/proc")
SHARED = Path("/dev/shm")
TRACKER = b"multiprocessing.resource_tracker"  # removes shared memory itself, once those who used it have ended

POLL_S = 0.5
SWEEP_S = 8.0
TRACKERS_S = 1.0  # for trackers to do so
CALM_S = 0.05  # between two looks that must both find nothing
LEAVE_S = 10.0  # that a driver waits for its guard

HOLD, LEAVE, END_ALL = b"hold", b"leave", b"end all"  # what a guard is told

_guarding = False
_early: "Told | None" = None  # a guard that guards already, for the block that comes


def fresh_mark() -> str:
    """One that nothing carries yet."""
    return uuid.uuid4().hex


@contextmanager
def guarded(directory: Path | None = None, *, lock: int | None = None, mark: str | None = None) -> Iterator[None]:
    """What this process starts in the block ends with it.

    Args:
        directory: of the run.
        lock: descriptor of a lock that is held until all has ended.
        mark: that this process carries since it was started, because it exists for this run alone: then all that is
            left at the end of the block is ended as well. Otherwise only the death of this process ends anything.
    """
    global _guarding, _early
    mine = _early is not None and lock is not None
    if (_guarding and not mine) or not PROCESSES.is_dir():
        yield
        return
    own, mark = mark is not None, mark or fresh_mark()
    marks = {MARK: mark, **PLAIN} | ({} if directory is None else {RUN: str(directory)})
    before = {name: os.environ.get(name) for name in marks}
    told, _early = _early or _started(mark), None
    if lock is not None:
        socket.send_fds(told.link, [HOLD + b"\n"], [lock])
    os.environ.update(marks)
    _guarding = True
    try:
        yield
    finally:
        _guarding = False
        _restore(before)
        _dismiss(told, END_ALL if own else LEAVE)


def guard_early(mark: str) -> None:
    """Guard what this process starts before it holds its directory. The block that holds it goes on with this guard.

    Args:
        mark: that this process carries since it was started, because it exists for this run alone.
    """
    global _guarding, _early
    if PROCESSES.is_dir():
        _early, _guarding = _started(mark), True


def end_early() -> None:
    """There will be no such block: end what was started."""
    global _guarding, _early
    if _early is not None:
        _dismiss(_early, END_ALL)
        _early, _guarding = None, False


class Told(NamedTuple):
    """A guard's process, and the way to tell it something."""

    process: subprocess.Popen[bytes]
    link: socket.socket


def _started(mark: str) -> Told:
    link, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, mark, str(os.getpid())],
            stdin=theirs.fileno(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,  # the terminal's signals are not for it
        )
    link.sendall(b"\0".join(map(os.fsencode, _names())).replace(b"\n", b"") + b"\n")
    return Told(process, link)


def _restore(before: Mapping[str, str | None]) -> None:
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _dismiss(told: Told, word: bytes) -> None:
    with told.link, suppress(OSError, subprocess.TimeoutExpired):
        told.link.sendall(word + b"\n")
        told.process.wait(timeout=LEAVE_S)


def main(mark: str, driver: int) -> None:
    """Watch, then sweep. Called in the guard's own process."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    guard = Guard(mark, driver)
    if guard.watch() != LEAVE:
        guard.sweep()


class Guard:
    """Watches one driver."""

    def __init__(self, mark: str, driver: int) -> None:
        self._mark = f"{MARK}={mark}".encode()
        self._driver = driver
        self._link = socket.socket(fileno=0)
        self._held: list[int] = []  # descriptors of locks
        self._alive = True
        self._not_ours: set[str] = set()  # names in /dev/shm that were there before
        self._shared: set[str] = set()  # names in /dev/shm that marked processes use, or used

    def watch(self) -> bytes:
        """Until the driver has ended, or says that it is about to. Returns its word."""
        watched: list[int] = [0]
        with suppress(OSError, AttributeError):  # an old kernel, or it has ended: its end of the link closes, too
            watched.append(os.pidfd_open(self._driver))
        said, knows = b"", False
        while True:
            if not (ready := select.select(watched, [], [], POLL_S)[0]):
                self._attribute()
                continue
            more, locks = socket.recv_fds(self._link, 65536, 1)[:2] if 0 in ready else (b"", [])
            self._held += locks
            if not more:
                return self._ended(b"")
            *lines, said = (said + more).split(b"\n")
            for line in lines:
                if not knows:
                    self._not_ours, knows = set(map(os.fsdecode, line.split(b"\0"))), True
                elif line != HOLD:
                    return self._ended(line)

    def _ended(self, word: bytes) -> bytes:
        self._alive = bool(word)
        return word

    def sweep(self) -> None:
        """Kill what is left, until nothing is."""
        began = time.monotonic()
        calm = False
        while (passed_s := time.monotonic() - began) < SWEEP_S:
            self._attribute()
            found = self._marked()
            trackers = {pid for pid in found if TRACKER in _read(pid, "cmdline")}
            if not found and calm:
                break
            calm = not found
            for pid in found - (trackers if passed_s < TRACKERS_S else set()):
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(CALM_S)
        used = {name for pid in _processes() for name in _used(pid)} if self._shared else set()
        for name in self._shared - used:
            with suppress(OSError):
                (SHARED / name).unlink()

    def _attribute(self) -> None:
        """Learn whose the new shared memory is, while its users live."""
        new = _names() - self._not_ours - self._shared
        if new:
            ours = {name for pid in self._marked(with_driver=True) for name in _used(pid)}
            self._shared |= new & ours

    def _marked(self, *, with_driver: bool = False) -> set[int]:
        """Who carries the mark, and whoever descends from one."""
        parents = _processes()
        found = {pid for pid in parents if self._mark in _read(pid, "environ").split(b"\0")}
        while more := {pid for pid, parent in parents.items() if parent in found and pid not in found}:
            found |= more
        if with_driver and self._alive:
            found.add(self._driver)
        elif self._alive:
            found.discard(self._driver)
        return found - {os.getpid()}


def _processes() -> dict[int, int]:
    """Process id -> its parent's, of all that are no zombies."""
    found = {}
    for name in os.listdir(PROCESSES):
        if name.isdigit():
            words = _read(int(name), "stat").rpartition(b")")[2].split()
            if words and words[0] not in (b"Z", b"X"):
                found[int(name)] = int(words[1])
    return found


def _read(pid: int, file: str) -> bytes:
    """Nothing where it has ended, or is somebody else's."""
    with suppress(OSError):
        return (PROCESSES / str(pid) / file).read_bytes()
    return b""


def _names() -> set[str]:
    with suppress(OSError):
        return set(os.listdir(SHARED))
    return set()


def _used(pid: int) -> set[str]:
    """Names in /dev/shm that a process maps."""
    before = f" {SHARED}/".encode()
    return {os.fsdecode(line.rpartition(before)[2]) for line in _read(pid, "maps").splitlines() if before in line}


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
