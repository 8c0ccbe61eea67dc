"""Memory is used again when nobody refers to it, and never before."""

import gc
import os
import signal
import socket
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
    assert [memory.buffer(SIZE).address for _ in range(1)] == [addresses[2]]


def test_a_collection_of_garbage_may_let_go_while_memory_is_given_out() -> None:
    memory = Memory()
    made = [written(memory, SIZE, number) for number in range(4)]
    with memory._lock:  # this thread is in the middle of it
        made.clear()
        assert memory.free_bytes == 0
    last = written(memory, SIZE, 1)
    assert memory.free_bytes == 3 * rounded(SIZE)
    del last
    assert memory.free_bytes == 4 * rounded(SIZE)


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


def test_what_is_lent_is_read_elsewhere_and_used_again_when_everybody_has_done() -> None:
    memory, elsewhere, further = Memory(), Memory(), Memory()
    made = written(memory, SIZE, 7)
    address, slice_at = made.address, 5000
    lent = memory.lend(made[slice_at:])
    assert lent is not None and lent[1] == slice_at
    del made  # all that is left is on its way
    assert memory.buffer(SIZE).address != address
    got = elsewhere.borrowed(*lent, SIZE - slice_at)
    assert not got.is_mutable and bytes(got[:9]) == b"\7" * 9
    again = elsewhere.lend(got[100:])
    assert again is not None and again[1] == slice_at + 100
    del got
    gc.collect()
    assert memory.buffer(SIZE).address != address
    passed_on = further.borrowed(*again, 50)
    assert bytes(passed_on) == b"\7" * 50
    del passed_on
    gc.collect()
    assert memory.buffer(SIZE).address == address


def test_a_kill_lets_go() -> None:
    memory = Memory()
    made = written(memory, SIZE, 7)
    address = made.address
    lent = memory.lend(made)
    assert lent is not None
    here, there = socket.socketpair()
    child = os.fork()
    if not child:  # it is all that holds it
        kept = Memory().borrowed(*lent, SIZE)
        there.send(bytes(kept[:1]))
        signal.pause()
    try:
        os.close(lent[0])
        del made
        assert here.recv(1) == b"\7"
        assert memory.buffer(SIZE).address != address
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        here.close(), there.close()
    assert memory.buffer(SIZE).address == address


def test_a_child_writes_to_nothing_of_its_parents() -> None:
    memory = Memory()
    made, free = written(memory, SIZE, 7), written(memory, SIZE, 8)
    address = free.address
    del free
    child = os.fork()
    if not child:
        memory.forked()
        held = [written(memory, SIZE, 1) for _ in range(2)]
        del made
        held += [written(memory, SIZE, 1) for _ in range(2)]
        os._exit(0 if len(held) == 4 else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert (np.frombuffer(made, np.uint8) == 7).all()
    again = memory.buffer(SIZE)
    assert again.address == address and bytes(again[:3]) == b"\x08" * 3


def test_of_more_files_than_are_kept_open_copies_are_made() -> None:
    memory, elsewhere = Memory(most_files=2), Memory(most_files=2)
    made = [written(memory, SIZE, number) for number in range(4)]
    lent = [memory.lend(each) for each in made]
    assert [each is None for each in lent] == [False, False, True, True]
    for _ in range(2):
        lent.append(memory.lend(made[0]))
    got = [elsewhere.borrowed(*each, SIZE) for each in lent if each is not None]
    assert [elsewhere.lend(each) is None for each in got] == [False, False, True, True]
    assert [each[0] for each in got] == [0, 1, 0, 0]
    del made, got
    gc.collect()
    assert memory.lend(memory.buffer(2 * SIZE)) is not None  # what is free makes room for another size


def test_a_file_that_does_not_hold_what_is_said_is_an_error() -> None:
    before = len(os.listdir("/proc/self/fd"))
    file = os.memfd_create("test")
    os.ftruncate(file, 100)
    with pytest.raises(OSError, match="a file of 100 bytes holds no 131072"):
        Memory().borrowed(file, 0, LEAST_BYTES)
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_lies_in_no_file_is_not_lent() -> None:
    memory = Memory()
    made = written(memory, SIZE, 1)
    assert memory.lend(pa.py_buffer(bytes(SIZE))) is None
    assert memory.lend(pa.allocate_buffer(LEAST_BYTES)) is None
    lent = memory.lend(made)
    assert lent is not None
    os.close(lent[0])


@pytest.mark.parametrize("size", [1, 2, 3, 65_537, 1_000_000, (1 << 30) + 1])
def test_a_size_grows_by_an_eighth_at_most(size: int) -> None:
    assert size <= rounded(size) <= max(size + 1, size * 9 // 8 + 1)
