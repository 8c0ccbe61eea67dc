"""The replay queue: the ledger's rules behind asynchronous calls that wait, repeat safely, and carry packs.

Consumes: groups of generation workers, verdicts of reward workers, steps of the learner.
Waits for: a draw that admission allows, a generated group, a full batch; each with a deadline.
Unblocked by: a step, newer weights or an ended lease; a put; a verdict.
"""

import asyncio
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from millrace.core import schema
from millrace.core.protocols import (
    Clock,
    Feedback,
    Grant,
    Orders,
    PromptSource,
    QueueStatus,
    Receipt,
    Resumption,
    Role,
    Taken,
)
from millrace.core.replay.config import QueueConfig
from millrace.core.replay.draws import Entry
from millrace.core.replay.journal import Journal, Location, MemoryJournal
from millrace.core.replay.ledger import Ledger
from millrace.core.types import GroupId, GroupVerdict, Lease, WorkerId, seed_of

Answer = TypeVar("Answer")

_REMEMBERED = 16  # answers per worker; a worker has no more calls in flight than that


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


class ReplayQueue:
    """Implements `core.protocols.Queue` in one event loop; between two awaits every call is one transaction."""

    def __init__(
        self,
        config: QueueConfig,
        source: PromptSource,
        *,
        seed: int,
        clock: Clock = time.monotonic,
        journal: Journal | None = None,
    ) -> None:
        self._config = config
        self._source = source
        self._seed = seed
        self._clock = clock
        self._journal: Journal = journal if journal is not None else MemoryJournal()
        self._ledger = Ledger(config, clock=clock, emit=self._journal.append)
        self._ledger.replay(self._journal.records())
        self._ledger.recover(self._journal.holds)
        self._draws, self._groups, self._batches = Waiters(), Waiters(), Waiters()
        self._idle: dict[str, str] = {}
        self._calls: Counter[str] = Counter()
        self._answers: dict[str, OrderedDict[str, Sequence[Receipt]]] = {}
        self._stopped = False

    # -- workers

    async def join(self, worker: WorkerId, *, role: Role, slots: int, generated: int = 0) -> int:
        """Enter or re-enter; `generated` is what the engine's counter shows already."""
        self._begin("join")
        epoch = self._ledger.join(worker, role=role, slots=slots, generated=generated)
        self._answers.pop(worker, None)
        self._changed(self._draws, self._groups)
        return epoch

    async def leave(self, worker: WorkerId, *, epoch: int, generated: int, abandoned: Mapping[GroupId, int]) -> None:
        self._begin("leave")
        self._ledger.leave(worker, epoch=epoch, generated=generated, abandoned=abandoned)
        self._idle.pop(worker, None)
        self._answers.pop(worker, None)
        self._changed(self._draws, self._groups)

    async def heartbeat(
        self, worker: WorkerId, *, epoch: int, progress: Mapping[GroupId, int], generated: int
    ) -> Orders:
        self._begin("heartbeat")
        fenced = self._ledger.heartbeat(worker, epoch=epoch, progress=progress, generated=generated)
        return Orders(fenced=fenced, newest_version=self._ledger.state.versions.newest, stop=self._over)

    async def lease_draws(
        self, worker: WorkerId, *, epoch: int, version: int, want: int, request: str, wait_s: float
    ) -> Grant:
        self._begin("lease_draws")

        def attempt() -> Grant | None:
            ledger = self._ledger
            known = ledger.current(worker, epoch, Role.GENERATION).answers
            repeat = request in known
            granted = [] if self._stopped and not repeat else self._lease(worker, epoch, version, want, request)
            short = (len(known[request]) if repeat else want) - len(granted)
            reason = ledger.why_idle(version, short) if short > 0 and not self._over and not repeat else ""
            self._idle[worker] = reason
            hears_nothing_new = ledger.state.versions.newest <= version
            if not granted and not repeat and not self._over and want > 0 and hears_nothing_new:
                return None
            return self._grant(granted, reason)

        return await self._until(self._draws, attempt, wait_s) or self._grant([], self._idle[worker])

    def _lease(self, worker: str, epoch: int, version: int, want: int, request: str) -> list[GroupId]:
        granted = self._ledger.lease_draws(worker, epoch=epoch, version=version, want=want, request=request)
        self._changed()
        return granted

    def _grant(self, granted: Sequence[GroupId], reason: str) -> Grant:
        leases = [self._lease_of(group) for group in granted]
        newest = self._ledger.state.versions.newest
        return Grant(leases=leases, newest_version=newest, idle=reason, finished=self._over)

    def _lease_of(self, group: GroupId) -> Lease:
        draw = self._ledger.state.draws[group.draw]
        n = self._config.group_size
        return Lease(
            id=group,
            prompt=self._source.draw(group.draw),
            n=n,
            seeds=tuple(seed_of(self._seed, group.draw, group.attempt, member) for member in range(n)),
            min_version=draw.min_version,
            epoch=draw.epoch,
        )

    async def put_groups(self, worker: WorkerId, *, epoch: int, pack: bytes, request: str) -> Sequence[Receipt]:
        self._begin("put_groups")

        def store(rows: Sequence[int]) -> list[Location]:
            return self._journal.store(pack, rows)

        def put() -> list[Receipt]:
            headers = schema.headers(pack)
            return self._ledger.put_groups(worker, epoch=epoch, headers=headers, store=store)

        receipts = self._once(worker, epoch, request, put)
        self._changed(self._groups, self._draws)
        return receipts

    async def lease_groups(self, worker: WorkerId, *, epoch: int, want: int, request: str, wait_s: float) -> bytes:
        self._begin("lease_groups")

        def attempt() -> bytes | None:
            ledger = self._ledger
            repeat = request in ledger.current(worker, epoch, Role.REWARD).answers
            groups = ledger.lease_groups(worker, epoch=epoch, want=want, request=request)
            self._idle[worker] = "" if groups else ledger.why_no_group()
            if not groups:
                return b"" if repeat else None
            self._changed()
            return self._pack(group.draw for group in groups)

        return await self._until(self._groups, attempt, wait_s) or b""

    async def put_verdicts(
        self, worker: WorkerId, *, epoch: int, verdicts: Sequence[GroupVerdict], request: str
    ) -> Sequence[Receipt]:
        self._begin("put_verdicts")

        def put() -> list[Receipt]:
            return self._ledger.put_verdicts(worker, epoch=epoch, verdicts=verdicts)

        receipts = self._once(worker, epoch, request, put)
        self._changed(self._batches, self._groups, self._draws)
        return receipts

    # -- the learner

    async def join_learner(self) -> Resumption:
        self._begin("join_learner")
        resumption = self._ledger.join_learner()
        self._changed(self._draws, self._batches)
        return resumption

    async def take(self, *, step: int, epoch: int, wait_s: float) -> Taken | None:
        self._begin("take")

        def attempt() -> Taken | None:
            entries = self._ledger.take(step=step, epoch=epoch)
            self._changed()
            self._idle["learner"] = "" if entries is not None else self._ledger.why_no_batch(step)
            return None if entries is None else self._taken(step, entries)

        return await self._until(self._batches, attempt, wait_s)

    def _taken(self, step: int, entries: Sequence[Entry]) -> Taken:
        return Taken(
            step=step,
            pack=self._pack(entry.draw for entry in entries),
            verdicts=[self._ledger.verdicts_of(entry.draw) for entry in entries],
            lag=[tuple(entry.lags) for entry in entries],
            masked=self._ledger.masks,
            uses=[self._ledger.use(entry.draw, step) for entry in entries],
        )

    async def filtered(self, *, step: int, epoch: int, groups: Mapping[GroupId, str]) -> None:
        self._begin("filtered")
        self._ledger.filtered(step=step, epoch=epoch, groups=groups)
        self._changed(self._draws, self._batches)

    async def trained(self, *, step: int, epoch: int, feedback: Feedback) -> int:
        self._begin("trained")
        version = self._ledger.trained(step=step, epoch=epoch, feedback=feedback)
        self._changed(self._draws, self._groups)
        return version

    async def announce(self, *, version: int, epoch: int) -> None:
        self._begin("announce")
        self._ledger.announce(version=version, epoch=epoch)
        self._changed(self._draws)

    async def commit(self, *, step: int, directory: str, digest: str, epoch: int) -> None:
        self._begin("commit")
        self._ledger.commit(step=step, directory=directory, digest=digest, epoch=epoch)
        self._changed()

    async def revert(self, *, step: int) -> None:
        """Fall back to an older commit, when the last one cannot be read. A learner joins afterwards."""
        self._begin("revert")
        self._ledger.revert(step=step)
        self._changed()

    # -- the run

    async def finish(self) -> None:
        """End the run early: no more draws, and every heartbeat is told to stop."""
        self._stopped = True
        self._changed(self._draws, self._groups, self._batches)

    async def status(self) -> QueueStatus:
        self._begin("status")
        idle = {worker: reason for worker, reason in self._idle.items() if reason}
        return self._ledger.status(idle=idle, calls=self._calls)

    @property
    def _over(self) -> bool:
        return self._stopped or self._ledger.finished

    # -- how calls wait, repeat and end

    def _begin(self, method: str) -> None:
        self._calls[method] += 1
        self._expire()

    def _expire(self) -> None:
        if self._ledger.expire():
            self._changed(self._draws, self._groups, self._batches)

    def _changed(self, *waiters: Waiters) -> None:
        """Make it durable, free what nobody needs, wake who may go on."""
        self._journal.flush()
        released = self._ledger.state.released
        for location in released:
            self._journal.forget(location)
        released.clear()
        for waiting in waiters:
            waiting.wake()

    async def _until(self, waiters: Waiters, attempt: Callable[[], Answer | None], wait_s: float) -> Answer | None:
        """Try now and after every change, until it answers or the deadline passes."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + wait_s
        while (answer := attempt()) is None:
            left = deadline - loop.time()
            if left <= 0:
                return None
            expiry = self._ledger.next_expiry()
            if expiry is not None:
                left = min(left, max(0.01, expiry - self._clock()))
            await waiters.wait(left)
            self._expire()
        return answer

    def _once(self, worker: str, epoch: int, request: str, put: Callable[[], Sequence[Receipt]]) -> Sequence[Receipt]:
        """The answer to a request; a repetition gets the same one."""
        known = self._answers.setdefault(worker, OrderedDict())
        key = f"{epoch}/{request}"
        if key not in known:
            known[key] = put()
            if len(known) > _REMEMBERED:
                known.popitem(last=False)
        return known[key]

    def _pack(self, draws: Iterable[int]) -> bytes:
        rows = []
        for index in draws:
            location = self._ledger.state.draws[index].location
            assert location is not None, f"draw {index} has no payload"
            rows.append(self._journal.load(location))
        return schema.select(rows)
