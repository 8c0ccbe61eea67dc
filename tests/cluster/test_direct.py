"""Calls over a Unix socket mean what calls in one process mean."""

import asyncio
import gc
import os
import pickle
import signal
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from millrace.cluster import direct
from millrace.cluster.direct import Caller, Cut, Door, Lines
from millrace.core import memory
from millrace.core.errors import Fenced
from millrace.core.memory import LEAST_BYTES


class Component:
    """What is called."""

    def __init__(self) -> None:
        self.event = asyncio.Event()

    async def call(self, method: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        return await getattr(self, method)(*args, **kwargs)

    async def echo(self, *args: Any, **kwargs: Any) -> Any:
        return args, kwargs

    async def kind(self, value: Any) -> tuple[str, bool]:
        return type(value).__name__, memoryview(value).readonly

    async def wait(self) -> str:
        await self.event.wait()
        return "woken"

    async def wake(self) -> None:
        self.event.set()

    async def refuse(self) -> None:
        raise Fenced("draw 3 is held by generation-1")

    async def unspeakable(self) -> Any:
        return lambda: None

    async def sealed(self) -> Any:
        return Sealed()

    async def odd(self) -> Any:
        return Odd()

    async def cancel(self) -> None:
        raise asyncio.CancelledError


def connected(scene: Callable[[Caller, Door], Awaitable[None]]) -> None:
    async def main() -> None:
        door = Door(Component().call)
        caller = Caller(door.address)
        await asyncio.wait_for(scene(caller, door), 20)
        door.close()

    asyncio.run(main())


def test_answers_come_as_they_were_given_and_by_number() -> None:
    async def scene(caller: Caller, door: Door) -> None:
        waiting = asyncio.ensure_future(caller.call("wait", (), {}))
        assert await caller.call("echo", (1, "a"), {"key": [None, 2.5]}) == ((1, "a"), {"key": [None, 2.5]})
        assert not waiting.done()
        await caller.call("wake", (), {})
        assert await waiting == "woken"

    connected(scene)


@pytest.mark.parametrize("size", [0, 1, 100_000, 9_000_000])
def test_large_buffers_cross_beside_the_pickle(size: int) -> None:
    """Larger than a socket holds, and than is read at once; many under way in both directions."""
    rng = np.random.default_rng(0)
    packs = [pa.py_buffer(rng.bytes(size + i)) for i in range(3)]
    array = rng.integers(0, 1000, size // 4, dtype=np.int32)

    async def scene(caller: Caller, door: Door) -> None:
        found = await asyncio.gather(*(caller.call("echo", (pack, array), {}) for pack in packs))
        for pack, ((got, numbers), _) in zip(packs, found, strict=True):
            assert isinstance(got, pa.Buffer) and got.equals(pack)
            assert np.array_equal(numbers, array) and not numbers.flags.writeable
        assert await caller.call("kind", (packs[0],), {}) == ("Buffer", True)

    connected(scene)


def test_what_is_raised_arrives_and_the_connection_goes_on() -> None:
    async def scene(caller: Caller, door: Door) -> None:
        with pytest.raises(Fenced, match="draw 3 is held"):
            await caller.call("refuse", (), {})
        with pytest.raises(RuntimeError, match="lambda.* cannot be sent"):
            await caller.call("unspeakable", (), {})
        with pytest.raises(RuntimeError, match="Sealed .* cannot be sent: .*it stays here"):
            await caller.call("sealed", (), {})
        with pytest.raises((AttributeError, pickle.PicklingError)):
            await caller.call("echo", (lambda: None,), {})
        with pytest.raises(ConnectionError, match="its process ends"):
            await caller.call("cancel", (), {})
        assert await caller.call("echo", (), {}) == ((), {})

    connected(scene)


class Sealed:
    """Refuses to be pickled, with an error of its own."""

    def __reduce__(self) -> Any:
        raise ValueError("it stays here")


class Odd:
    """Pickles, and cannot be read again."""

    def __reduce__(self) -> Any:
        return int, ("no number",)


def test_what_cannot_be_read_is_an_error_of_its_own_call() -> None:
    """On either side: no call is left without an answer."""

    async def scene(caller: Caller, door: Door) -> None:
        with pytest.raises(ValueError, match="no number"):
            await caller.call("echo", (Odd(),), {})
        with pytest.raises(ValueError, match="no number"):
            await caller.call("odd", (), {})
        with pytest.raises(AttributeError, match="nothing"):
            await caller.call("nothing", (), {})
        assert await caller.call("echo", (), {}) == ((), {})

    connected(scene)


def test_a_call_that_is_given_up_disturbs_no_other() -> None:
    async def scene(caller: Caller, door: Door) -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(caller.call("wait", (), {}), 0.01)
        await caller.call("wake", (), {})
        assert await caller.call("wait", (), {}) == "woken"

    connected(scene)


def test_calls_under_way_and_later_ones_end_when_the_other_end_does() -> None:
    async def scene(caller: Caller, door: Door) -> None:
        waiting = [asyncio.ensure_future(caller.call("wait", (), {})) for _ in range(3)]
        await asyncio.sleep(0)
        door.close()
        for call in waiting:
            with pytest.raises(Cut):
                await call
        assert not caller.open
        with pytest.raises(Cut):
            await caller.call("echo", (), {})

    connected(scene)


def answered_by(frame: bytes, files: Sequence[int] = ()) -> None:
    """A child answers the first call with this, and is killed: no answer, whatever it holds."""

    async def main() -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("\0" + (name := f"test-{os.getpid()}"))
            listener.listen()
            child = os.fork()
            if not child:
                link, _ = listener.accept()
                link.recv(100)
                socket.send_fds(link, [frame], list(files))
                os.kill(os.getpid(), signal.SIGKILL)
            caller = Caller(name)
            with pytest.raises(Cut):
                await asyncio.wait_for(caller.call("echo", (), {}), 20)
            os.waitpid(child, 0)

    asyncio.run(main())


def test_a_kill_is_seen_in_the_middle_of_an_answer() -> None:
    whole = pickle.dumps(("x" * 1000, None))
    answered_by(direct.HEAD.pack(0, len(whole), 0, 0) + whole[:500])


@pytest.mark.parametrize("held", [None, 100, LEAST_BYTES])
def test_a_file_that_is_missing_or_short_or_whose_frame_is_torn_is_no_answer(held: int | None) -> None:
    before = descriptors()
    files = [] if held is None else [os.memfd_create("test")]
    for file in files:
        os.ftruncate(file, held or 0)
    body = pickle.dumps((None, None))
    whole = direct.PLACE.pack(LEAST_BYTES, 0) + body
    frame = direct.HEAD.pack(0, len(whole), 1, 1) + whole
    answered_by(frame[:-1] if held == LEAST_BYTES else frame, files)
    for file in files:
        os.close(file)
    assert descriptors() == before


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def test_what_came_stays_readable_and_no_descriptor_is_left() -> None:
    pack = pa.py_buffer(bytes(range(256)) * 4096)
    kept: list[Any] = []

    async def scene(caller: Caller, door: Door) -> None:
        for _ in range(5):
            (got,), _ = await caller.call("echo", (pack,), {})
            kept.append(got)
        for _ in range(50):  # more than the socket takes of heads alone, and nobody reads any more
            task = asyncio.ensure_future(caller.call("wait", (pack, b"x" * 9_000), {}))
            await asyncio.sleep(0)
            task.cancel()
        door.close()
        while caller.open:
            await asyncio.sleep(0.01)

    left = set()
    for _ in range(3):
        connected(scene)
        assert all(each.equals(pack) for each in kept)
        kept.clear()
        left.add(descriptors())
    assert len(left) == 1  # of files that are used again


def test_what_can_be_lent_is_not_copied_on_its_way_and_only_then_used_again() -> None:
    """There and back: the very file that the pack was made in."""
    size = LEAST_BYTES + 8
    packs = [memory.buffer(size)]
    np.frombuffer(packs[0], np.uint8)[:] = 1
    address = packs[0].address
    kept: list[Any] = []

    async def scene(caller: Caller, door: Door) -> None:
        (got,), _ = await caller.call("echo", (packs[0][8:],), {})
        kept.append(got)

    connected(scene)
    np.frombuffer(packs[0], np.uint8)[100] = 2  # what only a test may do
    assert memoryview(kept[0])[92] == 2
    packs.clear()
    gc.collect()
    others = [memory.buffer(size) for _ in range(3)]
    assert address not in {each.address for each in others}
    kept.clear()
    gc.collect()
    assert memory.buffer(size).address == address


def test_more_buffers_than_files_cross_all_the_same() -> None:
    arrays = [np.full(LEAST_BYTES, number, np.uint8) for number in range(direct.MOST_FILES + 3)]

    async def scene(caller: Caller, door: Door) -> None:
        (got,), _ = await caller.call("echo", (arrays,), {})
        assert all(np.array_equal(each, array) for each, array in zip(got, arrays, strict=True))

    connected(scene)


def test_another_user_is_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        door = Door(Component().call)
        caller = Caller(door.address)
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
        with pytest.raises(PermissionError, match="another user"):
            Caller(door.address)
        with pytest.raises(Cut):  # it knocks, and the door looks at it with the same eyes
            await asyncio.wait_for(caller.call("echo", (), {}), 20)
        door.close()

    asyncio.run(main())


def test_a_connection_is_made_once_per_loop_and_again_when_it_ended() -> None:
    asked = []

    async def main(lines: Lines, doors: list[Door]) -> None:
        async def use() -> Any:
            caller = await lines.caller()
            assert caller is not None
            return await caller.call("echo", (1,), {})

        doors.append(Door(Component().call))
        assert await asyncio.gather(use(), use()) == [((1,), {})] * 2
        await use()
        doors[-1].close()
        await asyncio.sleep(0.01)
        doors.append(Door(Component().call))
        await use()
        doors[-1].close()

    doors: list[Door] = []

    async def address() -> str:
        asked.append(doors[-1].address)
        return asked[-1]

    lines = Lines(address)
    for _ in range(2):
        asyncio.run(main(lines, doors))
    assert asked == [door.address for door in doors] and len(set(asked)) == 4


@pytest.mark.parametrize("address", ["", "millrace-nobody"])
def test_where_no_door_can_be_reached_there_is_no_caller(address: str) -> None:
    async def elsewhere() -> str:
        return address

    async def main() -> None:
        assert await Lines(elsewhere).caller() is None

    asyncio.run(main())


def test_a_failure_to_ask_for_the_door_is_told_and_asked_again() -> None:
    failures = iter([ConnectionError("it is being restarted"), None])

    async def main() -> None:
        door = Door(Component().call)

        async def ask() -> str:
            if failure := next(failures):
                raise failure
            return door.address

        lines = Lines(ask)
        with pytest.raises(ConnectionError, match="restarted"):
            await lines.caller()
        assert await lines.caller() is not None
        door.close()

    asyncio.run(main())
