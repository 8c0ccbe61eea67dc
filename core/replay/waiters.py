"""Callers that wait for a change, that repeat a call, and how long the learner waited for what."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TypeVar

from millrace.core.errors import JournalFullError
from millrace.core.protocols import Clock, Receipt

T = TypeVar("T")

_REMEMBERED = 16  # answers per worker; a worker has no more calls in flight than that
_LACKING_S = 5.0
_STEPS = 4  # whose waits are remembered; a learner takes one step ahead at most


class Waiters:
    """Callers that wait for one kind of change."""

    def __init__(self) -> None:
        self._futures: set[asyncio.Future[None]] = set()

    def wake(self) -> None:
        for future in self._futures:
            if not future.done():
                future.set_result(None)

    async def wait(self, timeout_s: float) -> None:
        """Return at the next `wake`, or after the timeout."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._futures.add(future)
        try:
            await asyncio.wait([future], timeout=timeout_s)
        finally:
            self._futures.discard(future)


class Answers:
    """The last answers of each worker: a repeated request gets the same one."""

    def __init__(self) -> None:
        self._known: dict[str, OrderedDict[str, Sequence[Receipt]]] = {}

    def once(self, worker: str, epoch: int, request: str, put: Callable[[], Sequence[Receipt]]) -> Sequence[Receipt]:
        """The answer to a request; `put` makes it the first time."""
        known = self._known.setdefault(worker, OrderedDict())
        key = f"{epoch}/{request}"
        if key not in known:
            known[key] = put()
            if len(known) > _REMEMBERED:
                known.popitem(last=False)
        return known[key]

    def forget(self, worker: str) -> None:
        self._known.pop(worker, None)


class Room:
    """Whether the journal finds room on its disk: what it last lacked, until its callers have stopped trying."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lacked, self._until = "", 0.0

    def found(self, write: Callable[[], T]) -> T:
        """What `write` comes to.

        Raises:
            JournalFullError: it is remembered for `_LACKING_S`; whoever called calls again sooner.
        """
        try:
            return write()
        except JournalFullError as caught:
            self._lacked, self._until = str(caught), self._clock() + _LACKING_S
            raise

    @property
    def lacking(self) -> dict[str, str]:
        """As an entry of `QueueStatus.idle`."""
        return {"queue": self._lacked} if self._clock() < self._until else {}


class IdleClock:
    """How long the takes of a step have waited, by cause, over all their repetitions. Pure: time is an argument.

    >>> clock = IdleClock()
    >>> clock.waits((1, 0), "data", 10.0); clock.waits((1, 0), "judge", 12.5); clock.waits((1, 0), "", 13.0)
    >>> clock.of((1, 0))
    {'data': 2.5, 'judge': 0.5}
    """

    def __init__(self) -> None:
        self._spent: dict[tuple[int, int], dict[str, float]] = {}  # (learner epoch, step) -> cause -> seconds
        self.key = (0, -1)  # of the last take
        self.cause = ""  # "" while nobody waits
        self._since = 0.0

    def waits(self, key: tuple[int, int], cause: str, now: float) -> None:
        """A take was tried. "" when it has its batch."""
        if key != self.key:
            self.key, self.cause = key, ""
        self.look(cause, now)

    def look(self, cause: str, now: float) -> None:
        """What the same take waits for may have changed."""
        if self.cause and now > self._since:
            spent = self._spent.setdefault(self.key, {})
            spent[self.cause] = spent.get(self.cause, 0.0) + now - self._since
            while len(self._spent) > _STEPS:
                del self._spent[next(iter(self._spent))]
        self.cause, self._since = cause, now

    def of(self, key: tuple[int, int]) -> dict[str, float]:
        """Seconds so far."""
        return dict(self._spent.get(key, {}))
