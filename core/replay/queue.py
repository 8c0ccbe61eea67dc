"""The replay queue: the ledger's rules behind asynchronous calls that wait, repeat safely, and carry packs.

Consumes: groups of generation workers, verdicts of reward workers, steps of the learner.
Waits for: a draw that admission allows, a generated group, a full batch; each with a deadline.
Unblocked by: a step, newer weights or an ended lease; a put; a verdict.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from functools import partial
from typing import TypeVar

from millrace.core.errors import JournalError, JournalFullError, PayloadError
from millrace.core.protocols import (
    Clock,
    Feedback,
    Grant,
    Orders,
    PromptSource,
    Quarantined,
    QueueStatus,
    Receipt,
    Resumption,
    Role,
    Taken,
)
from millrace.core.replay import quarantine
from millrace.core.replay.config import QueueConfig
from millrace.core.replay.draw_table import add_lengths
from millrace.core.replay.draws import Entry
from millrace.core.replay.image import image
from millrace.core.replay.journal import Journal, MemoryJournal
from millrace.core.replay.ledger import Ledger
from millrace.core.replay.stall import Scene, report
from millrace.core.replay.waiters import Answers, IdleClock, Room, Waiters
from millrace.core.schema import Pack, headers, select
from millrace.core.types import GroupId, GroupVerdict, Lease, WorkerId, seed_of

Answer = TypeVar("Answer")

_BEHIND = 4096  # records that a restart reads again without being slow


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
        self._causes: dict[str, str] = {}
        self._waits = IdleClock()
        self._learner_called, self._learner_at = "", clock()
        self._calls: Counter[str] = Counter()
        self._answers, self._room = Answers(), Room(clock)
        self._stopped = False
        self._changed()
        self._compact()

    # -- workers

    async def join(self, worker: WorkerId, *, role: Role, slots: int, generated: int = 0) -> int:
        """Enter or re-enter; `generated` is what the engine's counter shows already."""
        self._begin("join")
        epoch = self._ledger.join(worker, role=role, slots=slots, generated=generated)
        self._answers.forget(worker)
        self._changed(self._draws, self._groups)
        return epoch

    async def leave(self, worker: WorkerId, *, epoch: int, generated: int, abandoned: Mapping[GroupId, int]) -> None:
        self._begin("leave")
        self._ledger.leave(worker, epoch=epoch, generated=generated, abandoned=abandoned)
        self._forget(worker)

    async def fence(self, worker: WorkerId, *, cause: str, traceback: str = "") -> Sequence[GroupId]:
        """Its process is gone; what it worked on goes to others at once."""
        self._begin("fence")
        held = self._ledger.fence(worker, cause=cause, traceback=traceback)
        self._forget(worker)
        return held

    def _forget(self, worker: str) -> None:
        self._waits_for(worker, "", "")
        self._answers.forget(worker)
        self._changed(self._draws, self._groups, self._batches)

    def _waits_for(self, worker: str, reason: str, cause: str) -> None:
        """What a worker waits for, in words and as one of IDLE; "" for nothing."""
        for table, value in ((self._idle, reason), (self._causes, cause)):
            table.pop(worker, None)
            if value:
                table[worker] = value
        self._look()

    def _look(self) -> None:  # what a waiting take lacks may be another thing now
        if self._waits.cause:
            self._waits.look(self._ledger.waits_for(self._waits.key[1], self._causes), self._clock())

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
            self._check_budget()
            repeat = request in known
            granted: list[GroupId] = []
            if repeat or not self._stopped:
                granted = ledger.lease_draws(worker, epoch=epoch, version=version, want=want, request=request)
                self._changed()
            short = (len(known[request]) if repeat else want) - len(granted)
            reason = ledger.why_idle(version, short, epoch) if short > 0 and not self._over and not repeat else ""
            hears_nothing_new = ledger.state.versions.newest <= version
            behind = version < 0 or not hears_nothing_new
            self._waits_for(worker, reason, ("weights" if behind else "scheduler") if reason else "")
            if not granted and not repeat and not self._over and want > 0 and hears_nothing_new:
                return None
            return self._grant(granted, reason)

        return await self._until(self._draws, attempt, wait_s) or self._grant([], self._idle.get(worker, ""))

    def _grant(self, granted: Sequence[GroupId], reason: str) -> Grant:
        leases, newest = [self._lease_of(group) for group in granted], self._ledger.state.versions.newest
        return Grant(leases=leases, newest_version=newest, idle=reason, finished=self._over)

    def _lease_of(self, group: GroupId) -> Lease:
        draw = self._ledger.state.draws[group.draw]
        n = self._config.group_size
        return Lease(
            id=group,
            prompt=self._source.draw(group.draw),
            n=n,
            seeds=tuple(seed_of(self._seed, group.draw, draw.variation, member) for member in range(n)),
            min_version=draw.min_version,
            epoch=draw.epoch,
        )

    async def put_groups(self, worker: WorkerId, *, epoch: int, pack: Pack, request: str) -> Sequence[Receipt]:
        self._begin("put_groups")

        def put() -> list[Receipt]:
            found = headers(pack)
            store = partial(self._journal.store, pack, of=len(found))
            return self._ledger.put_groups(
                worker, epoch=epoch, headers=found, store=lambda rows: self._room.found(lambda: store(rows))
            )

        receipts = self._answers.once(worker, epoch, request, put)
        self._changed(self._groups, self._draws, self._batches)
        return receipts

    async def fail_groups(self, worker: WorkerId, *, epoch: int, failures: Mapping[GroupId, str], request: str) -> None:
        """The engine failed on these. A repetition finds none of them leased and does nothing."""
        self._begin("fail_groups")
        self._ledger.fail_groups(worker, epoch=epoch, failures=failures)
        self._changed(self._draws, self._batches)

    async def lease_groups(self, worker: WorkerId, *, epoch: int, want: int, request: str, wait_s: float) -> Pack:
        self._begin("lease_groups")

        def attempt() -> Pack | None:
            ledger = self._ledger
            repeat = request in ledger.current(worker, epoch, Role.REWARD).answers
            groups = ledger.lease_groups(worker, epoch=epoch, want=want, request=request)
            self._waits_for(worker, "" if groups else ledger.why_no_group(), "" if groups else "data")
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

        receipts = self._answers.once(worker, epoch, request, put)
        self._changed(self._batches, self._groups, self._draws)
        return receipts

    # -- the learner

    async def join_learner(self) -> Resumption:
        self._begin_learner("join_learner")
        resumption = self._ledger.join_learner()
        self._changed(self._draws, self._batches)
        return resumption

    async def take(self, *, step: int, epoch: int, wait_s: float) -> Taken | None:
        self._begin_learner("take")
        key = (epoch, step)

        def attempt() -> Taken | None:
            self._check_budget()
            entries = self._ledger.take(step=step, epoch=epoch)
            self._changed()
            missing = entries is None
            self._waits.waits(key, self._ledger.waits_for(step, self._causes) if missing else "", self._clock())
            self._waits_for("learner", self._ledger.why_no_batch(step) if missing else "", "")
            return None if entries is None else self._taken(step, entries, self._waits.of(key))

        return await self._until(self._batches, attempt, wait_s)

    def _taken(self, step: int, entries: Sequence[Entry], idle_s: Mapping[str, float]) -> Taken:
        return Taken(
            step=step,
            pack=self._pack(entry.draw for entry in entries),
            verdicts=[self._ledger.verdicts_of(entry.draw) for entry in entries],
            lag=[tuple(entry.lags) for entry in entries],
            masked=self._ledger.masks,
            uses=[self._ledger.use(entry.draw, step) for entry in entries],
            idle_s=idle_s,
        )

    async def filtered(self, *, step: int, epoch: int, groups: Mapping[GroupId, str]) -> None:
        self._begin_learner("filtered")
        self._ledger.filtered(step=step, epoch=epoch, groups=groups)
        self._changed(self._draws, self._batches)

    async def trained(self, *, step: int, epoch: int, feedback: Feedback) -> int:
        self._begin_learner("trained")
        version = self._ledger.trained(step=step, epoch=epoch, feedback=feedback)
        self._changed(self._draws, self._groups)
        return version

    async def announce(self, *, version: int, epoch: int) -> None:
        self._begin_learner("announce")
        self._ledger.announce(version=version, epoch=epoch)
        self._changed(self._draws)

    async def commit(self, *, step: int, directory: str, digest: str, epoch: int) -> None:
        self._begin_learner("commit")
        self._ledger.commit(step=step, directory=directory, digest=digest, epoch=epoch)
        self._changed()
        self._compact()

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
        with suppress(JournalFullError):  # it is in what is said here
            self._begin("status")
        causes = self._causes | ({"learner": self._waits.cause} if self._waits.cause else {})
        return self._ledger.status(idle=self._idle | self._room.lacking, causes=causes, calls=self._calls)

    async def quarantined(self, *, after: int) -> Sequence[Quarantined]:
        """All draws that died, oldest first, without the first `after`."""
        self._begin("quarantined")
        return quarantine.told(self._ledger.state.quarantined[after:], self._source)

    async def stalled(self) -> str:
        """What everything waits for, in a few lines."""
        self._begin("stalled")
        scene = Scene(
            prompt=lambda draw: self._source.draw(draw).id,
            idle=self._idle,
            causes=self._causes,
            learner="waits" if self._waits.cause else self._learner_called,
            learner_s=self._clock() - self._learner_at,
        )
        return report(self._ledger, scene)

    def _check_budget(self) -> None:
        """Raises DataBudgetError when too many prompts have failed for the run to go on."""
        deaths = self._ledger.state.quarantined
        if len(deaths) >= self._config.max_dead and not self._over:
            raise quarantine.spent(deaths, self._source, most=self._config.max_dead)

    @property
    def _over(self) -> bool:
        return self._stopped or self._ledger.finished

    async def lengths(self) -> Mapping[int, Sequence[int]]:
        """Tokens of a rollout -> how many that long were generated, and how many of these trained."""
        state = self._ledger.state
        lengths = {tokens: [*counts] for tokens, counts in state.lengths.items()}
        for draw in state.draws.values():
            if draw.location is not None:
                add_lengths(lengths, draw)
        return lengths

    async def damage(self) -> Sequence[str]:
        """What the journal found missing or broken, a line each."""
        return list(self._journal.damage)

    async def export(self) -> int:
        """Write every rollout that is kept as a row of `rollouts.parquet`. Returns the number of rows."""
        self._changed()
        state = self._ledger.state
        live = [state.outcome(draw) for draw in state.draws.values() if draw.location is not None]
        return await asyncio.to_thread(self._journal.export, live)

    async def close(self) -> None:
        """The last call: the journal's files are whole, and another process may open them."""
        with closing(self._journal):
            self._changed()

    # -- how calls wait, repeat and end

    def _begin(self, method: str) -> None:
        self._calls[method] += 1
        self._expire()

    def _begin_learner(self, method: str) -> None:
        """A call of the learner's."""
        self._learner_called, self._learner_at = method, self._clock()
        self._begin(method)

    def _expire(self) -> None:
        if self._ledger.expire():
            self._changed(self._draws, self._groups, self._batches)

    def _changed(self, *waiters: Waiters) -> None:
        """Make it durable, with the facts of what nobody needs any more; wake who may go on."""
        for outcome in (released := self._ledger.state.released):
            self._journal.forget(outcome)
        released.clear()
        self._room.found(self._journal.flush)
        self._look()
        for waiting in waiters:
            waiting.wake()

    async def _until(self, waiters: Waiters, attempt: Callable[[], Answer | None], wait_s: float) -> Answer | None:
        """Try now and after every change, until it answers or the deadline passes."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + wait_s
        while (answer := self._healed(attempt)) is None:
            left = deadline - loop.time()
            if left <= 0:
                return None
            expiry = self._ledger.next_expiry()
            if expiry is not None:
                left = min(left, max(0.01, expiry - self._clock()))
            await waiters.wait(left)
            self._expire()
        return answer

    def _healed(self, attempt: Callable[[], Answer | None]) -> Answer | None:
        """A group whose payload cannot be read any more is drawn again, and the attempt made without it."""
        try:
            return attempt()
        except PayloadError:
            self._ledger.recover(self._journal.holds)
            self._changed(self._draws, self._groups, self._batches)
            return attempt()

    def _compact(self) -> None:
        """The records of a past that nobody asks for any more become one."""
        if self._journal.behind > _BEHIND:
            with suppress(JournalError):  # they stay, and the next commit tries again; a flush says what is wrong
                self._journal.compact(image(self._ledger.state))

    def _pack(self, draws: Iterable[int]) -> Pack:
        rows = []
        for index in draws:
            location = self._ledger.state.draws[index].location
            assert location is not None, f"draw {index} has no payload"
            rows.append(self._journal.load(location))
        return select(rows)
