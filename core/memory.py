"""Memory for packs, used again as soon as nobody refers to it, in this process or in another.

Pages that the system must first find and clear cost more than what is copied into them, several times as much on a
virtual machine that gives free memory back to its host. An allocator does not know that the next pack comes in a
moment.

The memory lies in files without names, so that another process of the machine can map it instead of being sent a copy,
and pass it on. A descriptor that is lent holds a shared lock (flock). The lock is the open file's: it lives as long as
any descriptor, message under way or mapping that came of it, in whichever process, and a kill ends it like any other
end. The memory is written to again when its owner could have locked the file alone.
"""

import fcntl
import mmap
import os
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from threading import Lock
from weakref import finalize

import numpy as np
import pyarrow as pa

LEAST_BYTES = 1 << 17  # below, Arrow's own pool and a socket's buffer are as fast
KEPT_BYTES = 256 << 20  # of what nobody here refers to, at most, in a process
MOST_FILES = 256  # that a process has open, own and borrowed ones; each takes two descriptors
STEPS = 8  # sizes between a power of two and the next


@dataclass(frozen=True, slots=True, eq=False)
class File:
    """A file in memory, mapped here."""

    descriptor: int
    memory: mmap.mmap
    address: int
    begin: int  # of the mapping, in the file
    owner: int  # the process that may write to it; 0 for one that is borrowed

    @property
    def size(self) -> int:
        return len(self.memory)


class Memory:
    """Buffers of one process, from any thread."""

    def __init__(self, kept_bytes: int = KEPT_BYTES, most_files: int = MOST_FILES) -> None:
        self._kept_bytes, self._most_files = kept_bytes, most_files
        self._let_go: deque[File] = deque()  # a collection of garbage may add to it at any moment
        self._free: list[File] = []  # own ones, what was let go last at the end; others may still read them
        self._files: dict[int, File] = {}  # all, by address
        self._lock = Lock()  # of the list and the table
        self.free_bytes = 0

    def buffer(self, size: int) -> pa.Buffer:
        """A buffer that can be written to, with any content; its memory is given out again when it, its slices and
        all that reads them in place are gone, here and wherever it was lent to."""
        file = self._taken(rounded(size)) if size >= LEAST_BYTES else None
        return self._given(file, 0, size) if file is not None else pa.allocate_buffer(size)

    def lend(self, buffer: pa.Buffer) -> tuple[int, int] | None:
        """A descriptor to send away and close, and where in its file the buffer begins. None: it lies in no file."""
        address = buffer.address
        with self._lock:
            self._sort_in()
            for file in self._files.values():
                if file.address <= address and address + buffer.size <= file.address + file.size:
                    break
            else:
                return None
        try:  # the buffer keeps the file
            descriptor = _locked(file.descriptor) if file.owner else os.dup(file.descriptor)
        except OSError:  # no more descriptors
            return None
        return descriptor, file.begin + address - file.address

    def borrowed(self, descriptor: int, offset: int, size: int) -> pa.Buffer:
        """What another process lent, to be read only. The descriptor is closed here, in time.

        Raises:
            OSError: the file does not hold it, or there is no room to map it.
        """
        try:
            if os.fstat(descriptor).st_size < offset + size:
                raise OSError(f"a file of {os.fstat(descriptor).st_size} bytes holds no {offset + size}")
            begin = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
            flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
            memory = mmap.mmap(descriptor, offset + size - begin, flags=flags, prot=mmap.PROT_READ, offset=begin)
            with self._lock:
                mapped = self._added(descriptor, memory, begin=begin, owner=0) if self._room() else None
        except BaseException:
            os.close(descriptor)
            raise
        if mapped is None:
            os.close(descriptor)
            copy: bytes = memory[offset - begin :]
            return pa.py_buffer(copy)
        return self._given(mapped, offset - begin, size)

    def _given(self, file: File, first: int, size: int) -> pa.Buffer:
        array = np.frombuffer(file.memory, np.uint8)  # whatever reads the memory refers to this object
        finalize(array, self._returned, file).atexit = False
        return pa.py_buffer(array[first : first + size])

    def _taken(self, size: int) -> File | None:
        """One of this size that nobody uses."""
        with self._lock:
            self._sort_in()
            for at, file in enumerate(self._free):  # what was let go first is the likeliest
                if file.size == size and _alone(file.descriptor):
                    self.free_bytes -= size
                    return self._free.pop(at)
            if not self._room():
                return None
            descriptor = -1
            try:
                descriptor = os.memfd_create("millrace", os.MFD_CLOEXEC)
                os.ftruncate(descriptor, size)
                return self._added(descriptor, mmap.mmap(descriptor, size), begin=0, owner=os.getpid())
            except OSError:  # no descriptors, or no memory for it: the caller asks the allocator
                if descriptor >= 0:
                    os.close(descriptor)
                return None

    def _added(self, descriptor: int, memory: mmap.mmap, *, begin: int, owner: int) -> File:
        file = File(descriptor, memory, pa.py_buffer(memory).address, begin, owner)
        self._files[file.address] = file
        return file

    def _room(self) -> bool:
        """Whether one more file may be opened; free ones make room for it."""
        while len(self._files) >= self._most_files and self._free:
            self._drop_oldest()
        return len(self._files) < self._most_files

    def _returned(self, file: File) -> None:
        self._let_go.append(file)
        while self._let_go and self._lock.acquire(blocking=False):  # held by this very thread: the next one sorts it in
            try:
                self._sort_in()
            finally:
                self._lock.release()

    def _sort_in(self) -> None:
        """What was let go is free, or, borrowed, not known here any more."""
        while self._let_go:
            file = self._let_go.popleft()
            if file.owner == os.getpid():
                self._free.append(file)
                self.free_bytes += file.size
            else:
                self._forget(file)
        while self.free_bytes > self._kept_bytes:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        file = self._free.pop(0)
        self.free_bytes -= file.size
        self._forget(file)

    def _forget(self, file: File) -> None:
        """Its mapping goes with the last array that refers to it, which may be on its way out only now."""
        del self._files[file.address]
        os.close(file.descriptor)

    def forked(self) -> None:
        """In a child: what its parent has free is the parent's, and what was given out is only read here."""
        self._lock = Lock()
        for file in self._free:
            self._forget(file)
        self._free.clear()
        self.free_bytes = 0


def _locked(descriptor: int) -> int:
    """The same file opened again, to be read, with a shared lock of its own."""
    again = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(again, fcntl.LOCK_SH)
    except OSError:
        os.close(again)
        raise
    return again


def _alone(descriptor: int) -> bool:
    """Whether nobody has anything left of what was lent."""
    with suppress(BlockingIOError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        return True
    return False


def rounded(size: int) -> int:
    """The next of eight sizes between a power of two and its double, so that like packs share their memory.

    >>> rounded(65_536), rounded(65_537), rounded(1_200_000)
    (65536, 73728, 1310720)
    """
    step = max(1, (1 << (size - 1).bit_length()) // 2 // STEPS)
    return -(-size // step) * step


_memory = Memory()
buffer, lend, borrowed = _memory.buffer, _memory.lend, _memory.borrowed
os.register_at_fork(after_in_child=_memory.forked)
