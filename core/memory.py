"""Memory for packs, used again as soon as nobody refers to it.

Pages that the system must first find and clear cost more than what is copied into them, several times as much on a
virtual machine that gives free memory back to its host. An allocator does not know that the next pack comes in a
moment.
"""

import mmap
from collections import deque
from threading import Lock
from weakref import finalize

import numpy as np
import pyarrow as pa

LEAST_BYTES = 1 << 16  # below, Arrow's own pool is as fast
KEPT_BYTES = 256 << 20  # of what nobody refers to, at most, in a process
STEPS = 8  # sizes between a power of two and the next


class Memory:
    """Buffers of one process, from any thread."""

    def __init__(self, kept_bytes: int = KEPT_BYTES) -> None:
        self._kept_bytes = kept_bytes
        self._let_go: deque[mmap.mmap] = deque()  # a collection of garbage may add to it at any moment
        self._free: list[mmap.mmap] = []  # what was let go last at the end
        self._lock = Lock()  # of the list
        self.free_bytes = 0

    def buffer(self, size: int) -> pa.Buffer:
        """A buffer that can be written to, with any content; its memory is given out again when it, its slices and
        all that reads them in place are gone."""
        if size < LEAST_BYTES:
            return pa.allocate_buffer(size)
        whole = rounded(size)
        memory = self._taken(whole) or mmap.mmap(-1, whole, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        array = np.frombuffer(memory, np.uint8)  # whatever reads the memory refers to this object
        finalize(array, self._returned, memory).atexit = False
        return pa.py_buffer(array[:size])

    def _taken(self, whole: int) -> mmap.mmap | None:
        with self._lock:
            for at in reversed(range(len(self._free))):
                if len(self._free[at]) == whole:
                    self.free_bytes -= whole
                    return self._free.pop(at)
        return None

    def _returned(self, memory: mmap.mmap) -> None:
        self._let_go.append(memory)
        while self._let_go and self._lock.acquire(blocking=False):  # held by this very thread: the next one sorts it in
            try:
                while self._let_go:
                    self._free.append(self._let_go.popleft())
                    self.free_bytes += len(self._free[-1])
                while self.free_bytes > self._kept_bytes:
                    self.free_bytes -= len(self._free.pop(0))  # not closed: its array is on its way out only now
            finally:
                self._lock.release()


def rounded(size: int) -> int:
    """The next of eight sizes between a power of two and its double, so that like packs share their memory.

    >>> rounded(65_536), rounded(65_537), rounded(1_200_000)
    (65536, 73728, 1310720)
    """
    step = max(1, (1 << (size - 1).bit_length()) // 2 // STEPS)
    return -(-size // step) * step


_memory = Memory()
buffer = _memory.buffer
