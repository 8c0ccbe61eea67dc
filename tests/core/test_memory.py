"""Memory is used again when nobody refers to it, and never before."""

import gc
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from millrace.core.memory import LEAST_BYTES, Memory, rounded

SIZE = 1 << 20


def written(memory: Memory, size: int, value: int) -> pa.Buffer:
    made = memory.buffer(size)
    np.frombuffer(made, np.uint8)[:] = value
    return made


def test_what_was_let_go_is_used_again() -> None:
    memory = Memory()
    first = written(memory, SIZE, 1)
    address = first.address
    assert first.size == SIZE and memory.free_bytes == 0
    del first
    assert memory.free_bytes == rounded(SIZE)
    assert memory.buffer(SIZE - 5).address == address
    assert memory.buffer(LEAST_BYTES - 1).size == LEAST_BYTES - 1


READERS: dict[str, Callable[[pa.Buffer], Any]] = {
    "itself": lambda made: made,
    "a slice": lambda made: made[8:],
    "a view of numpy": lambda made: np.frombuffer(made, np.uint8)[8:16],
    "a memoryview": lambda made: memoryview(made).toreadonly(),
    "an array of Arrow": lambda made: pa.Array.from_buffers(pa.uint8(), 16, [None, made[8:]]),
    "a view of an array of Arrow": lambda made: pa.Array.from_buffers(pa.uint8(), 16, [None, made]).to_numpy()[3:],
}


@pytest.mark.parametrize("name", READERS)
def test_nothing_is_used_again_while_somebody_reads_it(name: str) -> None:
    memory = Memory()
    reader = READERS[name](written(memory, SIZE, 7))
    gc.collect()
    assert memory.free_bytes == 0
    others = [written(memory, SIZE, 9) for _ in range(3)]
    assert bytes(memoryview(reader) if not isinstance(reader, pa.Array) else reader.to_numpy())[:8] == b"\7" * 8
    del reader, others
    gc.collect()
    assert memory.free_bytes == 4 * rounded(SIZE)


def test_no_more_is_kept_than_is_said_and_the_oldest_goes_first() -> None:
    memory = Memory(kept_bytes=3 * SIZE)
    made = [written(memory, SIZE, number) for number in range(5)]
    addresses = [each.address for each in made]
    while made:
        del made[0]
    assert memory.free_bytes == 3 * SIZE
    assert [memory.buffer(SIZE).address for _ in range(1)] == [addresses[-1]]


def test_a_collection_of_garbage_may_let_go_while_memory_is_given_out() -> None:
    memory = Memory()
    made = [written(memory, SIZE, number) for number in range(4)]
    with memory._lock:  # this thread is in the middle of it
        made.clear()
        assert memory.free_bytes == 0
    last = written(memory, SIZE, 1)
    del last
    assert memory.free_bytes == 5 * rounded(SIZE)


def test_threads_share_it() -> None:
    memory = Memory(kept_bytes=8 * SIZE)
    wrong = []

    def work(value: int) -> None:
        for _ in range(300):
            mine = written(memory, SIZE, value)
            if not (np.frombuffer(mine, np.uint8)[::4096] == value).all():
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert memory.free_bytes <= 8 * SIZE


@pytest.mark.parametrize("size", [1, 2, 3, 65_537, 1_000_000, (1 << 30) + 1])
def test_a_size_grows_by_an_eighth_at_most(size: int) -> None:
    assert size <= rounded(size) <= max(size + 1, size * 9 // 8 + 1)
