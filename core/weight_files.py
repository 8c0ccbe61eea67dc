"""Files of published weights: mapped by who reads them, and written again when nobody reads them any more.

Pages that the system must first find and clear cost several times as much as pages that a file has already, so the
file of a version that is let go becomes a spare one, which a later version overwrites. A reader holds a shared lock for
as long as its mapping lives; who overwrites takes the exclusive one. So what was mapped never changes.
"""

import fcntl
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from millrace.core.errors import WeightsError

SPARE = "spare-"
SPARES = 1  # more are deleted: publishing needs one while a reader still holds another
MOST_BYTES = 2**30  # in one write


class VersionGoneError(WeightsError):
    """The buffer of a handle was deleted before it was mapped: newer versions exist, fetch again."""


def map_file(path: str, *, mode: Literal["r", "c"] = "r") -> NDArray[np.uint8]:
    """A published buffer, mapped read-only ("r") or copy-on-write ("c", for libraries that want writable memory).

    Raises:
        VersionGoneError: the file was deleted, or is written again, since its handle was given out.
        WeightsError: it is empty.
    """
    gone = f"{path} was deleted before it was mapped: a newer version exists, fetch it"
    try:
        with open(path, "rb") as file:
            with suppress(OSError):  # a file system without locks, where none can be overwritten either
                if not _locked(file.fileno(), fcntl.LOCK_SH):
                    raise VersionGoneError(gone)
            if not os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                raise VersionGoneError(gone)
            # The mapping keeps a descriptor of its own, and with it the lock.
            access = mmap.ACCESS_READ if mode == "r" else mmap.ACCESS_COPY
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=access), np.uint8)
    except FileNotFoundError:
        raise VersionGoneError(gone) from None
    except ValueError as caught:
        raise WeightsError(f"{path}: cannot be mapped: {caught}") from None


def fill(path: Path, buffer: NDArray[np.uint8]) -> None:
    """Write the bytes to a new file, see `filling`."""
    with filling(path) as write:
        write(memoryview(np.ascontiguousarray(buffer).data))


@contextmanager
def filling(path: Path) -> Iterator[Callable[[memoryview], None]]:
    """What writes part after part to a new file at `path`, made of a spare one of its folder where there is one."""
    descriptor = _spare(path)
    if descriptor is None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    end = 0

    def write(part: memoryview) -> None:
        nonlocal end
        written = 0
        while written < len(part):
            written += os.pwrite(descriptor, part[written : written + MOST_BYTES], end + written)
        end += len(part)

    try:
        yield write
        os.ftruncate(descriptor, end)
    finally:
        with suppress(OSError):  # not by closing alone: a child process may have inherited the descriptor
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def let_go(path: Path) -> None:
    """The file of a version that nobody needs becomes a spare one, or is deleted where there are enough."""
    with suppress(FileNotFoundError):
        path.rename(path.with_name(f"{SPARE}{uuid4().hex}"))
    for older in _spares(path.parent)[SPARES:]:
        older.unlink(missing_ok=True)


def _spares(folder: Path) -> list[Path]:
    """Newest first: one that was let go long ago is still read only by who hangs."""
    found = []
    for path in folder.glob(f"{SPARE}*"):
        with suppress(FileNotFoundError):
            found.append((path.stat().st_ctime_ns, path))
    return [path for _, path in sorted(found, reverse=True)]


def _spare(path: Path) -> int | None:
    """A descriptor of a spare file that nobody reads, locked and renamed to `path`; None where there is none."""
    for spare in _spares(path.parent):
        try:
            descriptor = os.open(spare, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        with suppress(OSError):
            # Still a spare one under the lock: another writer may have finished with it since it was opened.
            if _locked(descriptor, fcntl.LOCK_EX) and os.path.samestat(os.stat(spare), os.fstat(descriptor)):
                spare.rename(path)
                return descriptor
        os.close(descriptor)
    return None


def _locked(descriptor: int, kind: int) -> bool:
    """Whether the lock was free."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
