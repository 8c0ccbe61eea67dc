"""One process's life: a queue on a journal, with an engine, a judge and a learner that call it."""

import shutil
from collections import Counter
from pathlib import Path

import numpy as np

from millrace.core import schema
from millrace.core.protocols import Feedback, Role
from millrace.core.replay.config import QueueConfig
from millrace.core.replay.disk import DiskJournal
from millrace.core.replay.journal import Journal, JournalConfig
from millrace.core.replay.queue import ReplayQueue
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

ENGINE, JUDGE = WorkerId("generation-0"), WorkerId("reward-0")
GOOD = Verdict(kind=VerdictKind.SCORED, score=1.0, components={"exact": 1.0}, feedback="right")
TOKENS = 3


class Source:
    def draw(self, index: int) -> Prompt:
        return Prompt(id=f"p{index}", text=f"What is {index}?", tokens_P=np.zeros(1, np.int32), answer=str(index))


class Life:
    """Steps of two groups of two rollouts, by hand."""

    def __init__(self, folder: Path, *, journal: Journal | None = None, steps: int = 4, **keep: object) -> None:
        config = QueueConfig(groups_per_step=2, group_size=2, steps=steps, max_lag=1, keep_commits=1)
        self.journal = journal or DiskJournal(folder, JournalConfig.model_validate(keep))
        self.queue = ReplayQueue(config, Source(), seed=0, journal=self.journal)
        self.generated = 0
        self.requests = 0
        self.trained: Counter[int] = Counter()

    async def begin(self) -> None:
        self.engine = await self.queue.join(ENGINE, role=Role.GENERATION, slots=8, generated=self.generated)
        self.judge = await self.queue.join(JUDGE, role=Role.REWARD, slots=8)
        self.resumption = await self.queue.join_learner()
        self.version, self.step = self.resumption.version, self.resumption.step
        await self.queue.announce(version=self.version, epoch=self.resumption.epoch)

    def request(self) -> str:
        self.requests += 1
        return str(self.requests)

    def group(self, lease: Lease) -> Group:
        self.generated += TOKENS * lease.n
        rollout = Rollout(
            tokens_T=np.full(TOKENS, lease.id.draw, np.int32),
            sampled_T=np.ones(TOKENS, np.bool_),
            behaviour_logprob_T=np.full(TOKENS, -0.5, np.float32),
            versions=(VersionRun(self.version, 0, TOKENS),),
            finish_reason="stop",
            seed=0,
        )
        return Group(id=lease.id, prompt=lease.prompt, rollouts=(rollout,) * lease.n, lease_epoch=lease.epoch)

    async def generate(self) -> None:
        grant = await self.queue.lease_draws(
            ENGINE, epoch=self.engine, version=self.version, want=8, request=self.request(), wait_s=0
        )
        groups = [self.group(lease) for lease in grant.leases]
        if groups:
            receipts = await self.queue.put_groups(
                ENGINE, epoch=self.engine, pack=schema.encode(groups), request=self.request()
            )
            assert all(receipt.accepted for receipt in receipts)
        await self.queue.heartbeat(ENGINE, epoch=self.engine, progress={}, generated=self.generated)

    async def score(self) -> None:
        pack = await self.queue.lease_groups(JUDGE, epoch=self.judge, want=8, request=self.request(), wait_s=0)
        if pack:
            verdicts = [GroupVerdict(id=header.id, verdicts=(GOOD,) * header.n) for header in schema.headers(pack)]
            await self.queue.put_verdicts(JUDGE, epoch=self.judge, verdicts=verdicts, request=self.request())

    async def learn(self) -> None:
        taken = await self.queue.take(step=self.step, epoch=self.resumption.epoch, wait_s=0)
        assert taken is not None
        headers = schema.headers(taken.pack)
        self.trained.update(header.id.draw for header in headers)
        feedback = Feedback(trained_tokens=sum(header.tokens for header in headers))
        self.version = await self.queue.trained(step=self.step, epoch=self.resumption.epoch, feedback=feedback)
        self.step += 1
        await self.queue.announce(version=self.version, epoch=self.resumption.epoch)

    async def one_step(self) -> None:
        await self.generate()
        await self.score()
        await self.learn()

    async def commit(self) -> None:
        await self.queue.commit(step=self.step, directory=f"step_{self.step}", digest="d", epoch=self.resumption.epoch)


async def a_life_until_the_kill(folder: Path, **keep: object) -> Life:
    """Step 1 committed, step 2 trained, more groups in every earlier state; then nothing more."""
    life = Life(folder, **keep)
    await life.begin()
    await life.one_step()
    await life.commit()
    await life.one_step()
    await life.generate()
    return life


def as_killed(folder: Path, name: str = "after") -> Path:
    """The files as a kill at this moment leaves them, in a folder beside it.

    What is sealed while it is copied changes its name; the copy is then made again.
    """
    copy = folder.with_name(f"{folder.name}-{name}")
    while True:
        try:
            return Path(shutil.copytree(folder, copy))
        except shutil.Error:
            shutil.rmtree(copy)
