"""The heart beats beside a busy worker, tells a consistent pulse, and says what it died of."""

import asyncio
import threading
import time

import pytest

from millrace.core.errors import DeadlineError, Fenced
from millrace.core.heart import Heart, Pulse
from millrace.core.protocols import Orders
from millrace.core.types import GroupId

NOTHING = Orders(fenced=(), newest_version=0)


class Partner:
    """A worker's pulse and a queue's end of the call, with what passed between them."""

    def __init__(self) -> None:
        self.tokens = 0
        self.received: list[Pulse] = []
        self.threads: set[str] = set()
        self.obeyed: list[Orders] = []
        self.answer: Orders | Exception = NOTHING

    async def read(self) -> Pulse:
        self.threads.add(f"read in {threading.current_thread().name}")
        return Pulse(generated=self.tokens, progress={GroupId(0, 0): self.tokens})

    async def send(self, pulse: Pulse) -> Orders:
        self.threads.add(f"send in {threading.current_thread().name}")
        self.received.append(pulse)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def obey(self, orders: Orders) -> None:
        self.threads.add(f"obey in {threading.current_thread().name}")
        self.obeyed.append(orders)

    def heart(self, *, every_s: float = 0.01, deadline_s: float = 30) -> Heart:
        return Heart(
            "generation-0", read=self.read, send=self.send, obey=self.obey, every_s=every_s, deadline_s=deadline_s
        )


async def until(condition: object) -> None:
    """Let the loop turn until `condition()` holds."""
    assert callable(condition)
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.002)


def test_it_reads_and_obeys_at_home_and_sends_from_its_own_thread() -> None:
    async def scenario() -> Partner:
        partner = Partner()
        partner.answer = Orders(fenced=(GroupId(3, 1),), newest_version=7, stop=True)
        heart = partner.heart()
        heart.start()
        await until(lambda: len(partner.obeyed) >= 2)
        await heart.stop()
        assert heart.beats >= 2
        return partner

    partner = asyncio.run(scenario())
    home = threading.main_thread().name
    assert partner.threads == {f"read in {home}", "send in heart of generation-0", f"obey in {home}"}
    assert partner.obeyed[0] == partner.answer


def test_a_busy_worker_still_beats_but_shows_no_progress() -> None:
    async def scenario() -> list[Pulse]:
        partner = Partner()
        partner.tokens = 5
        heart = partner.heart()
        heart.start()
        await until(lambda: partner.received)
        before = len(partner.received)
        partner.tokens = 9
        while len(partner.received) < before + 3:  # the worker's loop does not turn meanwhile
            time.sleep(0.001)
        stuck = partner.received[before + 1 :]
        await until(lambda: partner.received[-1].generated == 9)
        await heart.stop()
        return stuck

    stuck = asyncio.run(scenario())
    assert {pulse.generated for pulse in stuck} == {5}


def test_a_beat_that_fails_is_repeated() -> None:
    async def scenario() -> None:
        partner = Partner()
        partner.answer = ConnectionResetError("gone")
        heart = partner.heart()
        heart.start()
        await until(lambda: len(partner.received) >= 2)
        assert not partner.obeyed
        partner.answer = NOTHING
        await until(lambda: partner.obeyed)
        await heart.stop()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (ConnectionResetError("gone"), DeadlineError, "generation-0: heartbeat: no answer.*ConnectionResetError: gone"),
        (Fenced("epoch 1 of generation-0 has ended"), Fenced, "epoch 1 of generation-0 has ended"),
    ],
)
def test_watch_raises_what_the_heart_died_of(answer: Exception, error: type[Exception], message: str) -> None:
    async def scenario() -> None:
        partner = Partner()
        partner.answer = answer
        heart = partner.heart(deadline_s=0.1)
        heart.start()
        try:
            await heart.watch()
        finally:
            await heart.stop()

    with pytest.raises(error, match=message):
        asyncio.run(scenario())


def test_it_can_be_stopped_in_the_middle_of_a_beat() -> None:
    async def scenario() -> None:
        partner = Partner()
        sending = threading.Event()

        async def hang(pulse: Pulse) -> Orders:
            sending.set()
            await asyncio.sleep(3600)
            return NOTHING

        partner.send = hang  # type: ignore[method-assign]
        heart = partner.heart()
        heart.start()
        await until(sending.is_set)
        await heart.stop()
        assert not [thread for thread in threading.enumerate() if thread.name == "heart of generation-0"]

    asyncio.run(scenario())
