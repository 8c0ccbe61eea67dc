"""The groups that a generation worker has in hand, and where every token of its engine went."""

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from millrace.core.errors import EngineDeadError, EngineError
from millrace.core.heart import Pulse
from millrace.core.protocols import Engine, Sampling
from millrace.core.types import Group, GroupId, Lease, Rollout

READINGS = 20  # attempts at catching the engine between two steps, a millisecond apart


@dataclass(slots=True, eq=False)
class _Work:
    """A group in hand."""

    lease: Lease
    call: asyncio.Task[Sequence[Rollout]] | None = None
    begun: bool = False  # the engine has the call, or had it
    finished: int = 0  # tokens, when the call has returned
    aborted: int = 0  # tokens, when the call was given up
    given_up: str = ""  # why


class Hand:
    """Runs groups in an engine, a call for each. Its books hold at every moment, by the engine's own counter:

    generated = finished + given up + running
    """

    def __init__(self, engine: Engine, *, sampling: Sampling, changed: Callable[[], None]) -> None:
        """
        Args:
            changed: called whenever a group has left the hand, or is given up.
        """
        self._engine = engine
        self._sampling = sampling
        self._changed = changed
        self._works: dict[GroupId, _Work] = {}
        self._waiting: dict[GroupId, int] = {}  # finished groups whose put is not answered -> tokens
        self._finished = 0  # tokens of calls that returned
        self._aborted = 0  # tokens of calls that were given up, as far as they are booked to a group
        self._to_begin = 0  # responses of groups that the engine does not have yet
        self._booking = asyncio.Lock()
        self.abandoned: dict[GroupId, int] = {}  # groups given up -> all their tokens
        self.most_unfinished = 0

    def __len__(self) -> int:
        return len(self._works)

    @property
    def groups(self) -> Collection[GroupId]:
        return tuple(self._works)

    @property
    def unfinished(self) -> int:
        """Responses that wait for a slot or are being sampled, of all groups in hand."""
        return self._to_begin + self._engine.unfinished

    def take(self, lease: Lease) -> None:
        """Have it in hand; `generate` follows."""
        self._works[lease.id] = _Work(lease)
        self._to_begin += lease.n
        self.most_unfinished = max(self.most_unfinished, self.unfinished)

    def is_given_up(self, key: GroupId) -> bool:
        return bool(self._works[key].given_up)

    async def generate(self, key: GroupId) -> Group | None:
        """Sample the group; None when it was given up meanwhile.

        Raises:
            EngineError: a response failed, or is not what the lease asks for.
            EngineDeadError: there is no engine any more that could abort anything.
        """
        work = self._works[key]
        if work.given_up:
            return None
        work.call = asyncio.create_task(self._call(work))
        try:
            rollouts = await work.call
        except EngineDeadError:
            raise
        except EngineError:
            if work.given_up:
                return None
            raise
        check(work.lease, rollouts)
        self._waiting[key] = work.finished
        lease = work.lease
        return Group(id=key, prompt=lease.prompt, rollouts=tuple(rollouts), lease_epoch=lease.epoch)

    def drop(self, key: GroupId) -> None:
        """It is in hand no more, however it ended."""
        work = self._works.pop(key)
        if key not in self._waiting:
            self.abandoned[key] = work.finished + work.aborted
        if not work.begun:
            self._to_begin -= work.lease.n
        self._changed()

    async def give_up(self, key: GroupId, why: str) -> None:
        """Abort a group's call. One group at a time, so that the tokens aborted meanwhile are its own."""
        work = self._works.get(key)
        if work is None:
            return
        work.given_up = work.given_up or why
        self._changed()
        async with self._booking:
            if work.call is not None and not work.call.done():
                await self._engine.abort(str(key))
                await asyncio.wait([work.call])

    def answered(self, key: GroupId, *, accepted: bool) -> None:
        """The queue has answered the put of a finished group."""
        tokens = self._waiting.pop(key)
        if not accepted:
            self.abandoned[key] = tokens

    async def pulse(self) -> Pulse:
        """Counter and progress of one moment. The engine may be within a step: look until they agree."""
        for _ in range(READINGS):
            running = self._engine.progress()
            generated = self._engine.generated
            if self.closes(generated, running):
                break
            await asyncio.sleep(0.001)
        progress = {**self._waiting, **self.abandoned}
        for key, work in self._works.items():
            if key not in self._waiting:
                progress[key] = work.finished + work.aborted + running.get(str(key), 0)
        return Pulse(generated=generated, progress=progress)

    def closes(self, generated: int, running: Mapping[str, int]) -> bool:
        """Whether the books add up to the engine's counter."""
        return generated == self._finished + self._engine.aborted + sum(running.values())

    async def _call(self, work: _Work) -> Sequence[Rollout]:
        lease, rollouts = work.lease, None
        if work.given_up:  # before this task had its first turn: the engine has no call to abort yet
            raise EngineError(f"{lease.id}: {work.given_up}")
        work.begun = True
        self._to_begin -= lease.n
        try:
            rollouts = await self._engine.sample(
                lease.prompt.tokens_P, sampling=self._sampling, seeds=lease.seeds, key=str(lease.id)
            )
        finally:
            if rollouts is None:  # in the same moment in which the engine has booked it as aborted
                work.aborted = self._engine.aborted - self._aborted
                self._aborted = self._engine.aborted
        work.finished = sum(len(rollout) for rollout in rollouts)
        self._finished += work.finished
        return rollouts


def check(lease: Lease, rollouts: Sequence[Rollout]) -> None:
    """Whether the engine sampled what the lease asks for.

    Raises:
        EngineError: older weights than the lease admits, or log-probabilities that are not finite.
    """
    for rollout in rollouts:
        if rollout.versions[0].version < lease.min_version:
            raise EngineError(
                f"{lease.id}: a first token was sampled by version {rollout.versions[0].version}, below the "
                f"lease's {lease.min_version}: the engine went back to older weights; end it"
            )
        if not np.isfinite(rollout.behaviour_logprob_T).all():
            token = int(np.argmin(np.isfinite(rollout.behaviour_logprob_T)))
            raise EngineError(
                f"{lease.id}, seed {rollout.seed}: token {token} of {len(rollout)} has log-probability "
                f"{rollout.behaviour_logprob_T[token]}: the model's logits are not finite on this prompt"
            )
