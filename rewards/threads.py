"""Threads that call user code, which may take long, hang, or never return."""

import asyncio
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from millrace.core.errors import DeadlineError, MillraceError

MOST_HANGING = 64  # threads that passed their deadline and never returned, before their worker is given up


class Hanging(DeadlineError):
    """So many calls hang in this process that it is of no use any more. Nothing is said of any response."""


class InTurn:
    """The responses of a group, from which one thread takes them in turn until the rest is taken from it."""

    def __init__(self, given: Sequence[Mapping[str, Any]]) -> None:
        self._given = given
        self._begun = 0
        self._rest: Sequence[Mapping[str, Any]] | None = None
        self._lock = threading.Lock()

    def next(self) -> Mapping[str, Any] | None:
        """The next one; None when there is none, or none any more."""
        with self._lock:
            if self._begun >= len(self._given) or self._rest is not None:
                return None
            self._begun += 1
            return self._given[self._begun - 1]

    def leave(self) -> Sequence[Mapping[str, Any]]:
        """Those that were not begun, and will not be; the same whenever it is asked."""
        with self._lock:
            if self._rest is None:
                self._rest = self._given[self._begun :]
            return self._rest


class _Call:
    """One call on its way through a thread."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function = function
        self.loop = asyncio.get_running_loop()
        self.answer: asyncio.Future[Any] = self.loop.create_future()
        self.ended = False
        self.given_up = False

    def deliver(self, value: Any, error: MillraceError | None) -> None:
        self.ended = True
        if self.answer.done():
            return
        if error is None:
            self.answer.set_result(value)
        else:
            self.answer.set_exception(error)


class Threads:
    """Daemon threads: one that hangs in user code neither blocks the others nor the end of the process."""

    def __init__(self, *, whose: str) -> None:
        self._calls: queue.SimpleQueue[_Call] = queue.SimpleQueue()
        self._whose = whose
        self._free = 0
        self._stuck = 0

    async def run(self, function: Callable[[], Any]) -> Any:
        """Call it in a thread. A cancelled call keeps its thread until it ends.

        Raises:
            Hanging: too many threads hang already.
        """
        if self._stuck >= MOST_HANGING:
            raise Hanging(
                f"{self._stuck} calls of {self._whose} passed their deadline and never returned: give what it waits "
                'for a timeout of its own, or write rewards.verifier = { name = "isolated", verifier = ... }'
            )
        call = _Call(function)
        if self._free:
            self._free -= 1
        else:
            threading.Thread(target=self._work, name="verifier", daemon=True).start()
        self._calls.put(call)
        try:
            return await call.answer
        finally:
            if call.ended:
                self._free += 1
            else:  # the caller gives it up, the thread cannot
                call.given_up = True
                self._stuck += 1

    def _work(self) -> None:
        while True:
            call = self._calls.get()
            value, error = None, None
            try:
                value = call.function()
            except MillraceError as caught:
                error = caught
            with suppress(RuntimeError):  # the loop is closed: nobody waits
                call.loop.call_soon_threadsafe(self._deliver, call, value, error)

    def _deliver(self, call: _Call, value: Any, error: MillraceError | None) -> None:
        """On the loop: a call that was given up, but ended after all, frees its thread."""
        if call.given_up:
            self._stuck -= 1
            self._free += 1
        call.deliver(value, error)
