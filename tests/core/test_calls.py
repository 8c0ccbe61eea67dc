"""Calls are repeated until answered, and finished items leave in packs."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import pytest

from millrace.core import calls
from millrace.core.calls import Bell, Outbox, persist
from millrace.core.errors import DeadlineError, Fenced, JournalFullError


def test_a_call_that_fails_is_repeated_until_answered() -> None:
    attempts = 0

    async def call() -> str:
        nonlocal attempts
        attempts += 1
        if attempts < 3:
            raise ConnectionResetError("gone")
        return "answer"

    assert asyncio.run(persist(call, what="w: put", remedy="", deadline_s=30)) == "answer"
    assert attempts == 3


def test_what_the_queue_refuses_is_an_answer() -> None:
    attempts = 0

    async def call() -> None:
        nonlocal attempts
        attempts += 1
        raise Fenced("epoch 1 has ended")

    with pytest.raises(Fenced, match="epoch 1 has ended"):
        asyncio.run(persist(call, what="w: put", remedy="", deadline_s=30))
    assert attempts == 1


def test_the_deadline_names_who_what_cause_and_remedy() -> None:
    async def call() -> None:
        raise ConnectionResetError("gone")

    with pytest.raises(DeadlineError) as caught:
        asyncio.run(
            persist(call, what="generation-0: put_groups (draw 3 attempt 0)", remedy="Restart.", deadline_s=0.1)
        )
    for part in ("generation-0", "draw 3 attempt 0", "ConnectionResetError: gone", "deadline 0.1 s", "Restart."):
        assert part in str(caught.value)


def test_a_call_that_hangs_ends_at_the_deadline() -> None:
    with pytest.raises(DeadlineError, match="neither returned nor failed"):
        asyncio.run(persist(lambda: asyncio.sleep(60), what="w: take", remedy="", deadline_s=0.05))


def sent(items: Sequence[int], *, linger_s: float, full: int) -> list[list[int]]:
    """The packs in which items leave that are put while the first pack is under way."""

    async def scenario() -> list[list[int]]:
        packs: list[list[int]] = []
        under_way, go_on = asyncio.Event(), asyncio.Event()

        async def send(pack: Sequence[int]) -> None:
            packs.append(list(pack))
            under_way.set()
            await go_on.wait()

        outbox = Outbox[int](send, linger_s=linger_s, full=full)
        running = asyncio.create_task(outbox.run())
        outbox.put(-1)
        await under_way.wait()
        for item in items:
            outbox.put(item)
        go_on.set()
        await outbox.drain()
        running.cancel()
        return packs

    return asyncio.run(scenario())


def test_what_finished_while_a_pack_was_under_way_leaves_together() -> None:
    assert sent([1, 2, 3], linger_s=0, full=100) == [[-1], [1, 2, 3]]


def test_a_full_pack_does_not_linger_and_nothing_is_lost() -> None:
    # With this linger the test would not end: the first pack is full with one item, and drain ends the second's.
    assert sent([1], linger_s=3600, full=1) == [[-1], [1]]


def test_the_first_item_waits_for_company() -> None:
    async def scenario() -> list[list[int]]:
        packs: list[list[int]] = []
        gone = asyncio.Event()

        async def send(pack: Sequence[int]) -> None:
            packs.append(list(pack))
            gone.set()

        outbox = Outbox[int](send, linger_s=3600, full=3)
        running = asyncio.create_task(outbox.run())
        for item in range(3):
            outbox.put(item)
            await asyncio.sleep(0)
        await gone.wait()
        running.cancel()
        return packs

    assert asyncio.run(scenario()) == [[0, 1, 2]]


def test_a_bell_wakes_those_whose_condition_holds_now() -> None:
    async def main() -> None:
        bell, room, woken = Bell(), [0], []

        async def wait(least: int) -> None:
            await bell.until(lambda: room[0] >= least)
            woken.append(least)

        waiting = [asyncio.ensure_future(wait(least)) for least in (1, 2)]
        await asyncio.sleep(0)
        room[0] = 1
        bell.ring()
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        assert woken == [1]
        room[0] = 2
        bell.ring()
        await asyncio.gather(*waiting)
        assert woken == [1, 2]

    asyncio.run(main())


def test_a_bell_that_nobody_rings_is_not_waited_for_longer_than_said() -> None:
    asyncio.run(asyncio.wait_for(Bell().until(lambda: False, 0.01), 5))


class Minutes:
    """A clock that a call moves on."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def full_for(calls: int, each_s: float, clock: Minutes) -> Callable[[], Awaitable[str]]:
    """A call that finds the disk full so often."""
    left = [calls]

    async def call() -> str:
        clock.now += each_s
        left[0] -= 1
        if left[0] >= 0:
            raise JournalFullError("ledger.sqlite cannot be written: make room on that disk")
        return "answer"

    return call


def test_a_full_disk_is_waited_for_beyond_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "FIRST_PAUSE_S", 0.0)
    clock = Minutes()
    call = full_for(4, 100.0, clock)
    assert asyncio.run(persist(call, what="w: put", remedy="", deadline_s=60, clock=clock)) == "answer"


def test_a_disk_that_stays_full_is_an_answer_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "FIRST_PAUSE_S", 0.0)
    clock = Minutes()
    with pytest.raises(JournalFullError, match="make room on that disk"):
        asyncio.run(persist(full_for(99, 100.0, clock), what="w: put", remedy="", deadline_s=60, clock=clock))
    assert clock.now == 700.0
