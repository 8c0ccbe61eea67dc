"""A run directory as other processes see it: who runs it, the order to stop, lines as they come.

Files alone carry all of it, so that a run can be watched and stopped from any machine that sees its directory.
"""

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from millrace.core.errors import ConfigError

LOCK = "run.lock"
STOP = "stop"
CONFIG = "config.toml"
RESULT = "result.json"
METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
ROLLOUTS = "rollouts.jsonl"
REPORT = "report.html"
PROGRESS_LOG = "progress.log"  # the lines a person reads
DRIVER_LOG = "driver.log"  # whatever else the driver's process and Ray print

LEDGER = ("ledger.sqlite", "ledger.sqlite-wal", "ledger.holder", "rollouts.parquet")
OF_A_RUN = (STOP, RESULT, METRICS, ROLLOUTS, REPORT, *LEDGER, "status.json", PROGRESS_LOG, DRIVER_LOG)

GLANCE_S = 2.0  # others who look whether a run is held, hold it themselves for microseconds
POLL_S = 0.2
REMAINS_S = 10.0  # for the processes of a run whose driver was killed


@contextmanager
def held(directory: Path) -> Iterator[int]:
    """Hold the directory: nobody else runs in it meanwhile. The system lets go of it whenever this process ends.

    Yields:
        The lock's descriptor; a process that is given it holds the directory as well.
    Raises:
        ConfigError: another process runs in it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    file = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o644)

    def forked() -> None:
        if holding:
            os.close(file)  # or a child that outlives this process would hold on

    os.register_at_fork(after_in_child=forked)
    holding = True
    try:
        deadline = time.monotonic() + GLANCE_S
        while not _locked(file, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                raise ConfigError(in_use(directory))
            time.sleep(POLL_S / 4)
        os.truncate(file, 0)
        os.pwrite(file, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        yield file
    finally:
        holding = False
        os.close(file)


def is_held(directory: Path) -> bool:
    """Whether a process, here or on another machine, runs in the directory."""
    try:
        file = os.open(directory / LOCK, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return not _locked(file, fcntl.LOCK_SH)
    finally:
        os.close(file)


def wait_for_remains(directory: Path) -> None:
    """Where the process that ran in it has ended, here, what is left of its run is being ended: wait for that."""
    began = time.monotonic()
    while is_held(directory) and (passed_s := time.monotonic() - began) < REMAINS_S:
        with suppress(OSError, ValueError, KeyError):
            told = json.loads((directory / LOCK).read_bytes())
            # One that was killed this moment still looks alive.
            if told["host"] != socket.gethostname() or (passed_s > 2 * POLL_S and _alive(told["pid"])):
                return
        time.sleep(POLL_S)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except ProcessLookupError:
        return False
    except OSError:
        return True


def holder(directory: Path) -> str:
    """Who ran in it last: `by process 12 on host`."""
    with suppress(OSError, ValueError, KeyError):
        told = json.loads((directory / LOCK).read_bytes())
        return f"by process {told['pid']} on {told['host']}"
    return "by another process"


def in_use(directory: Path) -> str:
    """What is said to a second one who would run in it."""
    return (
        f"{directory} is being run {holder(directory)}: wait for it, end it with `millrace stop {directory}`, or give "
        "this run another name"
    )


def _locked(file: int, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def order_stop(directory: Path, *, now: bool) -> None:
    """Leave the order for the driver, which looks for it all the time."""
    partial = directory / f".{STOP}.partial"
    partial.write_text("now" if now else "in order")
    partial.replace(directory / STOP)


def ordered_to_stop(directory: Path) -> str | None:
    """`"in order"`, `"now"`, or None."""
    try:
        return (directory / STOP).read_text()
    except FileNotFoundError:
        return None


def finished(directory: Path, *, steps: int) -> Mapping[str, Any] | None:
    """The result of a run that has nothing left to do."""
    try:
        found: Mapping[str, Any] = json.loads((directory / RESULT).read_text())
    except FileNotFoundError:
        return None
    return found if found["ended"] == "finished" and found["steps"] >= steps else None


class Tail:
    """The lines of a growing file, each once. A file that is replaced, as by a run that was resumed from an earlier
    step, is read anew: what stayed in it is not repeated, what is made again comes again."""

    def __init__(self, path: Path, *, offset: int = 0) -> None:
        self._path = path
        self._offset = offset
        self._file: IO[bytes] | None = None
        self._seen: set[int] = set()  # lines of the file that is open
        self._old: set[int] = set()  # lines of those before it

    def read(self) -> list[bytes]:
        """Whole lines since the last call; a torn one is left for later."""
        if self._file is not None and self._replaced(self._file):
            rest = self._lines(self._file)
            self._file.close()
            self._file, self._offset = None, 0
            self._old |= self._seen
            return rest + self.read()
        if self._file is None:
            try:
                self._file = self._path.open("rb")
            except FileNotFoundError:
                return []
        return self._lines(self._file)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _replaced(self, file: IO[bytes]) -> bool:
        opened = os.fstat(file.fileno())
        try:
            there = self._path.stat()
        except FileNotFoundError:
            return False
        return (opened.st_dev, opened.st_ino) != (there.st_dev, there.st_ino)

    def _lines(self, file: IO[bytes]) -> list[bytes]:
        file.seek(self._offset)
        whole, newline, _torn = file.read().rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        lines = [line for line in whole.split(b"\n") if line]
        self._seen.update(map(hash, lines))
        return [line for line in lines if hash(line) not in self._old]


def follow(path: Path, ended: Callable[[], bool], *, offset: int = 0) -> Iterator[bytes]:
    """Lines as they come, until the run has ended and all were given."""
    tail = Tail(path, offset=offset)
    try:
        while True:
            last = ended()  # asked first: what was written before the end is read behind it
            yield from tail.read()
            if last:
                return
            time.sleep(POLL_S)
    finally:
        tail.close()
