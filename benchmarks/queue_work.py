"""The rollouts of the queue's benchmark, and the calls that take them through our queue.

A *round* is some packs that are leased, put, judged and taken, each pack one step's batch. `Clocks` says which calls
are in which clock. The queue is an actor on Ray, or an object of this process.
"""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter as now
from typing import Any

import numpy as np

from millrace.core import schema
from millrace.core.protocols import Feedback, Role
from millrace.core.replay.config import QueueConfig
from millrace.core.types import (
    Group,
    GroupVerdict,
    Lease,
    Prompt,
    Rollout,
    Verdict,
    VerdictKind,
    VersionRun,
    WorkerId,
)

BYTES_PER_TOKEN = 12  # id, log-probability and version, 4 bytes each: what the peers carry
PAYLOADS = {"small": 576, "large": 32_768}  # tokens of a rollout: 6.9 and 393 KB
BATCHES = (1, 16, 64, 256)  # rollouts in a put, and in a take
GROUP = 8  # rollouts of a group, where a batch has as many
ROUND = {"small": 4096, "large": 256}  # rollouts alive at once, at most
AHEAD = 8  # batches alive at once, at most
COMMIT_EVERY = 16  # steps

ENGINE, JUDGE = WorkerId("generation-0"), WorkerId("reward-0")
GOOD = Verdict(kind=VerdictKind.SCORED, score=1.0)


def batches_alive(payload: str, batch: int) -> int:
    """Batches of a round, for every arm.

    >>> batches_alive("small", 64), batches_alive("large", 64), batches_alive("large", 256)
    (8, 4, 1)
    """
    return max(1, min(AHEAD, ROUND[payload] // batch))


@dataclass(slots=True)
class Clocks:
    """Seconds in the calls of rounds.

    put_and_take: encode and `put_groups`; `take`, decode, `trained` and, every 16 steps, `commit`.
    all_calls: these, `lease_draws`, `lease_groups`, decode, `put_verdicts`, `announce`, `heartbeat`.
    """

    rollouts: int = 0
    put_s: float = 0.0
    take_s: float = 0.0
    other_s: float = 0.0

    @contextmanager
    def on(self, name: str) -> Iterator[None]:
        began = now()
        yield
        setattr(self, name, getattr(self, name) + now() - began)

    @property
    def put_and_take(self) -> float:
        """Rollouts per second."""
        return self.rollouts / (self.put_s + self.take_s)

    @property
    def all_calls(self) -> float:
        """Rollouts per second."""
        return self.rollouts / (self.put_s + self.take_s + self.other_s)


class Source:
    """Prompts of ten tokens."""

    def draw(self, index: int) -> Prompt:
        return Prompt(id=str(index), text="What is 3 + 4?", tokens_P=np.arange(10, dtype=np.int32))


def queue_config(batch: int, ahead: int) -> QueueConfig:
    """One batch per step, and `ahead` batches admitted."""
    group = min(GROUP, batch)
    return QueueConfig(groups_per_step=batch // group, group_size=group, steps=10**9, max_lag=ahead, keep_commits=1)


class Line:
    """A generation worker, a reward worker and a learner in one, at a queue that nobody else calls."""

    def __init__(self, queue: Any, *, tokens: int, batch: int, ahead: int, read: bool) -> None:
        """
        Args:
            tokens: of a rollout.
            batch: rollouts of a put and of a take.
            ahead: batches of a round.
            read: the learner reads every array, not just has it.
        """
        self._queue = queue
        self._tokens, self._batch, self._ahead, self._read = tokens, batch, ahead, read
        self._group = min(GROUP, batch)
        rng = np.random.default_rng(0)
        self._arrays = [
            (rng.integers(0, 150_000, tokens, dtype=np.int32), -rng.random(tokens, dtype=np.float32))
            for _ in range(min(batch * ahead, 256))
        ]
        self._sampled_T = np.ones(tokens, np.bool_)
        self._requests = self._step = self._generated = 0
        self.wire_bytes = [0, 0]  # put, taken

    async def begin(self) -> None:
        """Join in all three roles."""
        self._engine_epoch = await self._queue.join(ENGINE, role=Role.GENERATION, slots=1)
        self._judge_epoch = await self._queue.join(JUDGE, role=Role.REWARD, slots=1)
        resumption = await self._queue.join_learner()
        self._epoch, self._version = resumption.epoch, resumption.version
        await self._queue.announce(version=self._version, epoch=self._epoch)

    async def round(self, clocks: Clocks) -> None:
        """`ahead` batches, from the lease to the step that trains them."""
        with clocks.on("other_s"):
            leases = await self._lease()
        sampled = self._sampled(leases)
        with clocks.on("put_s"):
            await asyncio.gather(*(self._put(groups) for groups in sampled))
        with clocks.on("other_s"):
            await asyncio.gather(*(self._judge() for _ in range(self._ahead)))
        with clocks.on("take_s"):
            await self._learn()
        with clocks.on("other_s"):
            await self._queue.announce(version=self._version, epoch=self._epoch)
            await self._queue.heartbeat(ENGINE, epoch=self._engine_epoch, progress={}, generated=self._generated)
        clocks.rollouts += self._batch * self._ahead

    def _request(self) -> str:
        self._requests += 1
        return f"request-{self._requests}"

    async def _lease(self) -> list[Sequence[Lease]]:
        want = self._batch // self._group
        call = {"epoch": self._engine_epoch, "version": self._version, "want": want, "wait_s": 60.0}
        grants = await asyncio.gather(
            *(self._queue.lease_draws(ENGINE, request=self._request(), **call) for _ in range(self._ahead))
        )
        leases = [grant.leases for grant in grants]
        assert all(len(each) == want for each in leases), "the round was not admitted as a whole"
        return leases

    def _sampled(self, leases: Sequence[Sequence[Lease]]) -> list[list[Group]]:
        """What an engine would return: not in any clock."""
        versions = (VersionRun(self._version, 0, self._tokens),)
        self._generated += self._tokens * self._batch * self._ahead
        rollouts = [
            Rollout(
                tokens_T=ids_T,
                sampled_T=self._sampled_T,
                behaviour_logprob_T=logprob_T,
                versions=versions,
                finish_reason="length",
                seed=1,
            )
            for ids_T, logprob_T in self._arrays
        ]
        places = iter(range(0, 10**9, self._group))
        return [
            [
                Group(id=each.id, prompt=each.prompt, rollouts=self._some(rollouts, at), lease_epoch=each.epoch)
                for each, at in zip(part, places, strict=False)
            ]
            for part in leases
        ]

    def _some(self, rollouts: Sequence[Rollout], at: int) -> tuple[Rollout, ...]:
        first = at % len(rollouts)
        return tuple(rollouts[first : first + self._group])

    async def _put(self, groups: Sequence[Group]) -> None:
        pack = schema.encode(groups)
        self.wire_bytes[0] += len(pack)
        receipts = await self._queue.put_groups(ENGINE, epoch=self._engine_epoch, pack=pack, request=self._request())
        assert all(receipt.accepted for receipt in receipts), receipts

    async def _judge(self) -> None:
        call = {"epoch": self._judge_epoch, "want": self._batch // self._group, "wait_s": 60.0}
        groups = schema.decode(await self._queue.lease_groups(JUDGE, request=self._request(), **call))
        verdicts = [GroupVerdict(id=group.id, verdicts=(GOOD,) * len(group.rollouts)) for group in groups]
        await self._queue.put_verdicts(JUDGE, epoch=self._judge_epoch, verdicts=verdicts, request=self._request())

    async def _learn(self) -> None:
        """The steps of a round; while a batch is read the next is on its way, and then the answer to `trained`."""
        last = self._step + self._ahead
        taking = asyncio.ensure_future(self._take(self._step))
        told: asyncio.Future[int] | None = None
        while self._step < last:
            taken = await taking
            self._version = await told if told else self._version  # a step may be taken ahead, not two
            if self._step + 1 < last:
                taking = asyncio.ensure_future(self._take(self._step + 1))
            self.wire_bytes[1] += len(taken.pack)
            groups = schema.decode(taken.pack)
            if self._read:
                for rollout in (each for group in groups for each in group.rollouts):
                    rollout.tokens_T.sum(), rollout.behaviour_logprob_T.sum()
            feedback = Feedback(trained_tokens=self._tokens * self._group * len(groups))
            told = asyncio.ensure_future(self._trained(self._step, feedback))
            self._step += 1
        self._version = await told if told else self._version

    async def _trained(self, step: int, feedback: Feedback) -> int:
        version: int = await self._queue.trained(step=step, epoch=self._epoch, feedback=feedback)
        if (step + 1) % COMMIT_EVERY == 0:
            await self._queue.commit(step=step + 1, directory=f"step_{step + 1}", digest="d", epoch=self._epoch)
        return version

    async def _take(self, step: int) -> Any:
        taken = await self._queue.take(step=step, epoch=self._epoch, wait_s=60.0)
        assert taken is not None, f"step {step} has no batch after a minute"
        return taken


async def begun(line: Line) -> None:
    """Joined, and one round made that nobody measures."""
    await line.begin()
    await line.round(Clocks())


async def rounds(line: Line, *, seconds: float) -> Clocks:
    """As many as fit into `seconds`, one at least."""
    clocks = Clocks()
    began = now()
    while not clocks.rollouts or now() - began < seconds:
        await line.round(clocks)
    return clocks


def journal_bytes(directory: Path) -> int:
    """Of everything that the journal of a run directory holds."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
