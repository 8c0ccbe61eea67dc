"""How a worker calls the queue: again until it is answered, and in packs.

Both generation and reward workers put what they finish, and neither may import the other; hence in core.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Generic, TypeVar

from millrace.core.errors import DeadlineError, JournalFullError, MillraceError, boundary
from millrace.core.protocols import Clock

T = TypeVar("T")
Item = TypeVar("Item")

FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 1.0
ROOM_S = 600.0  # how long a full disk is waited for


class Unanswered(MillraceError):
    """The call did not get through: its machine, process or connection failed, not the request."""


async def persist(
    call: Callable[[], Awaitable[T]], *, what: str, remedy: str, deadline_s: float, clock: Clock = time.monotonic
) -> T:
    """Repeat a call until it is answered or `deadline_s` has passed.

    `call` must be repeatable: the same request id each time. What the queue refuses on purpose (any of our
    own errors, `Fenced` among them) is an answer and is raised at once; that its disk is full is none for `ROOM_S`.

    Args:
        what: worker, method and draws, for the message.
        remedy: what the reader of the message can do.
        deadline_s: seconds over all attempts.
    Raises:
        DeadlineError: naming `what`, the last cause and `remedy`.
    """
    first = began = clock()
    pause_s = FIRST_PAUSE_S
    attempts = 0
    while True:
        attempts += 1
        try:
            with boundary(what, Unanswered):
                async with asyncio.timeout(max(0.0, began + deadline_s - clock())):
                    return await call()
        except JournalFullError:
            began = clock()  # it is there, and answers
            if began - first > ROOM_S:
                raise
        except Unanswered as caught:
            if clock() - began + pause_s > deadline_s:
                raise DeadlineError(
                    f"{what}: no answer in {clock() - began:.1f} s and {attempts} attempts "
                    f"(deadline {deadline_s:g} s). Last cause: {_cause(caught)}. {remedy}"
                ) from caught
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def _cause(caught: Unanswered) -> str:
    cause = caught.__cause__
    if isinstance(cause, TimeoutError) and not str(cause):
        return "the call neither returned nor failed"
    return f"{type(cause).__name__}: {cause}"


class Bell:
    """Wakes whoever waits for a condition that may hold now. Belongs to one event loop."""

    def __init__(self) -> None:
        self._rung = asyncio.Event()

    def ring(self) -> None:
        """Everybody who waits looks at his condition again."""
        self._rung.set()
        self._rung = asyncio.Event()

    async def until(self, condition: Callable[[], bool], timeout_s: float | None = None) -> None:
        """Return when the condition holds, or after the timeout."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not condition():
                    await self._rung.wait()


class Outbox(Generic[Item]):
    """Finished items leave in packs: all that finished while the last pack was under way, and a little longer.

    One pack is under way at a time, so items wait at most one round trip plus `linger_s`, and the number of
    calls is bounded by time, not by items.
    """

    def __init__(self, send: Callable[[Sequence[Item]], Awaitable[None]], *, linger_s: float, full: int) -> None:
        """
        Args:
            send: delivers one pack; what it raises ends `run`.
            linger_s: how long the first item of a pack waits for company.
            full: a pack of this many items does not linger.
        """
        self._send = send
        self._linger_s = linger_s
        self._full = full
        self._waiting: list[Item] = []
        self._arrived = asyncio.Event()
        self._filled = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._draining = False

    def put(self, item: Item) -> None:
        self._waiting.append(item)
        self._empty.clear()
        self._arrived.set()
        if len(self._waiting) >= self._full:
            self._filled.set()

    def flush(self) -> None:
        """Nothing else will finish soon: what waits leaves now."""
        if self._waiting:
            self._filled.set()

    async def drain(self) -> None:
        """Return when all that was put has been sent; nothing lingers from now on."""
        self._draining = True
        self._filled.set()
        await self._empty.wait()

    async def run(self) -> None:
        """Send until cancelled."""
        while True:
            await self._arrived.wait()
            await self._linger()
            pack, self._waiting = self._waiting, []
            self._arrived.clear()
            if not self._draining:
                self._filled.clear()
            await self._send(pack)
            if not self._waiting:
                self._empty.set()

    async def _linger(self) -> None:
        if self._linger_s <= 0 or self._filled.is_set():
            return
        try:
            async with asyncio.timeout(self._linger_s):
                await self._filled.wait()
        except TimeoutError:
            return


@asynccontextmanager
async def together() -> AsyncIterator[asyncio.TaskGroup]:
    """A task group whose first failure ends the others and is raised as it is, not in a group."""
    try:
        async with asyncio.TaskGroup() as tasks:
            yield tasks
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from failures.exceptions[0].__cause__
