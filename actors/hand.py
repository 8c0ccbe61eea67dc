"""The groups that a generation worker has in hand, and where every token of its engine went."""

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

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
    unfinished: int  # responses
    calls: dict[str, asyncio.Task[Sequence[Rollout]]] = field(default_factory=dict)  # by the engine's key
    finished: int = 0  # tokens of its calls that returned
    aborted: int = 0  # tokens of its calls that were given up
    given_up: str = ""  # why


class Hand:
    """Runs groups in an engine. Its books hold at every moment, by the engine's own counter:

    generated = finished + given up + running
    """

    def __init__(self, engine: Engine, *, sampling: Sampling, whole_groups: bool, changed: Callable[[], None]) -> None:
        """
        Args:
            whole_groups: sample a group in one call instead of one call for each response.
            changed: called whenever a response has finished or a group has left the hand.
        """
        self._engine = engine
        self._sampling = sampling
        self._whole_groups = whole_groups
        self._changed = changed
        self._works: dict[GroupId, _Work] = {}
        self._waiting: dict[GroupId, int] = {}  # finished groups whose put is not answered -> tokens
        self._finished = 0  # tokens of calls that returned
        self._aborted = 0  # tokens of calls that were given up, as far as they are booked to a group
        self._booking = asyncio.Lock()
        self.abandoned: dict[GroupId, int] = {}  # groups given up -> all their tokens
        self.unfinished = 0  # responses, of all groups in hand
        self.most_unfinished = 0

    def __len__(self) -> int:
        return len(self._works)

    @property
    def groups(self) -> Collection[GroupId]:
        return tuple(self._works)

    def take(self, lease: Lease) -> None:
        """Have it in hand; `generate` follows."""
        self._works[lease.id] = _Work(lease, lease.n)
        self.unfinished += lease.n
        self.most_unfinished = max(self.most_unfinished, self.unfinished)

    def is_given_up(self, key: GroupId) -> bool:
        return bool(self._works[key].given_up)

    async def generate(self, key: GroupId) -> Group | None:
        """Sample the group; None when it was given up meanwhile.

        Raises:
            EngineError: a response failed; the others of the group were aborted.
            EngineDeadError: there is no engine any more that could abort anything.
        """
        work = self._works[key]
        if work.given_up:
            return None
        try:
            rollouts = await self._sampled(work)
        except EngineDeadError:
            raise
        except EngineError as caught:
            fenced = bool(work.given_up)
            await self.give_up(key, str(caught))
            if fenced:
                return None
            raise
        self._waiting[key] = work.finished
        lease = work.lease
        return Group(id=key, prompt=lease.prompt, rollouts=tuple(rollouts), lease_epoch=lease.epoch)

    def drop(self, key: GroupId) -> None:
        """It is in hand no more, however it ended."""
        work = self._works.pop(key)
        for call in work.calls.values():
            call.cancel()  # only where `generate` itself was cancelled is there one left
        if key not in self._waiting:
            self.abandoned[key] = work.finished + work.aborted
        self.unfinished -= work.unfinished
        self._changed()

    async def give_up(self, key: GroupId, why: str) -> None:
        """Abort a group's calls. One group at a time, so that the tokens aborted meanwhile are its own."""
        work = self._works.get(key)
        if work is None:
            return
        work.given_up = work.given_up or why
        self._changed()
        async with self._booking:
            running = {name: call for name, call in work.calls.items() if not call.done()}
            for name in running:
                await self._engine.abort(name)
            if running:
                await asyncio.wait(running.values())

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
                progress[key] = work.finished + work.aborted + sum(running.get(name, 0) for name in work.calls)
        return Pulse(generated=generated, progress=progress)

    def closes(self, generated: int, running: Mapping[str, int]) -> bool:
        """Whether the books add up to the engine's counter."""
        return generated == self._finished + self._engine.aborted + sum(running.values())

    async def _sampled(self, work: _Work) -> Sequence[Rollout]:
        """All responses of a group, from one call or from one call each."""
        seeds = work.lease.seeds
        for number, part in enumerate([seeds] if self._whole_groups else [(seed,) for seed in seeds]):
            name = f"{work.lease.id} call {number}"
            work.calls[name] = asyncio.create_task(self._call(work, name, part))
        done = await asyncio.gather(*work.calls.values())
        rollouts = [rollout for part in done for rollout in part]
        for rollout in rollouts:
            if rollout.versions[0].version < work.lease.min_version:
                raise EngineError(
                    f"{work.lease.id}: a first token was sampled by version {rollout.versions[0].version}, below the "
                    f"lease's {work.lease.min_version}: the engine went back to older weights; end it"
                )
            if not np.isfinite(rollout.behaviour_logprob_T).all():
                token = int(np.argmin(np.isfinite(rollout.behaviour_logprob_T)))
                raise EngineError(
                    f"{work.lease.id}, seed {rollout.seed}: token {token} of {len(rollout)} has log-probability "
                    f"{rollout.behaviour_logprob_T[token]}: the model's logits are not finite on this prompt"
                )
        return rollouts

    async def _call(self, work: _Work, name: str, seeds: Sequence[int]) -> Sequence[Rollout]:
        tokens_P = work.lease.prompt.tokens_P
        rollouts: Sequence[Rollout] | None = None
        if work.given_up:  # before its task had its first turn: the engine has no call to abort yet
            raise EngineError(f"{name}: {work.given_up}")
        try:
            rollouts = await self._engine.sample(tokens_P, sampling=self._sampling, seeds=seeds, key=name)
        finally:
            if rollouts is None:  # in the same moment in which the engine has booked it as aborted
                work.aborted += self._engine.aborted - self._aborted
                self._aborted = self._engine.aborted
        tokens = sum(len(rollout) for rollout in rollouts)
        work.finished += tokens
        self._finished += tokens
        work.unfinished -= len(seeds)
        self.unfinished -= len(seeds)
        self._changed()
        return rollouts
