"""The heartbeat of a worker: a thread of its own, so that a busy worker does not look dead.

What a beat tells is read on the worker's own loop, where nothing changes underneath it; if that loop is
busy, the beat goes out with what it told last: the worker is alive, but its work has made no progress.
"""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from millrace.core.calls import persist
from millrace.core.errors import MillraceError
from millrace.core.protocols import Clock, Orders
from millrace.core.types import GroupId


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulse:
    """What a beat tells, read in one piece."""

    generated: int = 0  # the engine's own counter of all tokens it ever sampled
    progress: Mapping[GroupId, int] = field(default_factory=dict)  # tokens so far of each group in hand


class Heart:
    """Beats every `every_s` seconds until stopped; hands the orders it receives to the worker's loop."""

    def __init__(
        self,
        name: str,
        *,
        read: Callable[[], Awaitable[Pulse]],
        send: Callable[[Pulse], Awaitable[Orders]],
        obey: Callable[[Orders], None],
        every_s: float,
        deadline_s: float,
        clock: Clock = time.monotonic,
    ) -> None:
        """
        Args:
            name: of the worker, for messages.
            read: takes the pulse; runs on the loop that calls `start`.
            send: the heartbeat call; runs on the heart's loop.
            obey: receives each answer; runs on the loop that calls `start`.
            deadline_s: how long the queue may stay silent before `watch` raises.
        """
        self._name = name
        self._read = read
        self._send = send
        self._obey = obey
        self._every_s = every_s
        self._deadline_s = deadline_s
        self._clock = clock
        self._last = Pulse()
        self.beats = 0

    def start(self) -> None:
        """Begin beating; called once, on the worker's loop."""
        self._home = asyncio.get_running_loop()
        self._failed: asyncio.Future[None] = self._home.create_future()
        self._loop = asyncio.new_event_loop()
        self._task = self._loop.create_task(self._live())
        self._thread = threading.Thread(target=self._run, name=f"heart of {self._name}", daemon=True)
        self._thread.start()

    async def watch(self) -> None:
        """Wait until the heart fails.

        Raises:
            DeadlineError: the queue has not answered for `deadline_s`.
            MillraceError: whatever the queue refused the heartbeat with, `Fenced` above all.
        """
        await asyncio.shield(self._failed)

    async def stop(self) -> None:
        """Stop beating; a beat under way is given up. Returns when the thread has ended."""
        self._loop.call_soon_threadsafe(self._task.cancel)
        await asyncio.to_thread(self._thread.join)
        self._loop.close()
        if not self._failed.done():
            self._failed.cancel()
        elif not self._failed.cancelled():
            self._failed.exception()  # marks it as seen: whoever stops has ended the watch

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        with suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._task)
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())

    async def _live(self) -> None:
        remedy = (
            "Look at the queue's process and its machine; the work in hand is leased to others when its leases end."
        )
        try:
            while True:
                orders = await persist(
                    self._beat,
                    what=f"{self._name}: heartbeat",
                    remedy=remedy,
                    deadline_s=self._deadline_s,
                    clock=self._clock,
                )
                self.beats += 1
                self._at_home(self._obey, orders)
                await asyncio.sleep(self._every_s)
        except MillraceError as caught:
            self._at_home(self._fail, caught)

    async def _beat(self) -> Orders:
        reading = asyncio.run_coroutine_threadsafe(self._take_pulse(), self._home)
        try:
            async with asyncio.timeout(self._every_s):
                self._last = await asyncio.wrap_future(reading)
        except TimeoutError:
            reading.cancel()
        return await self._send(self._last)

    async def _take_pulse(self) -> Pulse:
        return await self._read()

    def _at_home(self, callback: Callable[..., None], argument: object) -> None:
        with suppress(RuntimeError):  # the worker's loop is closed: there is nobody left to tell
            self._home.call_soon_threadsafe(callback, argument)

    def _fail(self, error: MillraceError) -> None:
        if not self._failed.done():
            self._failed.set_exception(error)
