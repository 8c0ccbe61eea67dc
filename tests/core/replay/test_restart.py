"""The records outlive the process: what was committed stays, everything else is drawn again."""

import asyncio
import gc
import json
from collections import Counter
from pathlib import Path

import numpy as np

from millrace.core import schema
from millrace.core.protocols import Feedback, Role
from millrace.core.replay.config import QueueConfig
from millrace.core.replay.journal import LineJournal
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
GOOD = Verdict(kind=VerdictKind.SCORED, score=1.0)
TOKENS = 3


class Source:
    def draw(self, index: int) -> Prompt:
        return Prompt(id=str(index), text="", tokens_P=np.zeros(1, np.int32))


class Life:
    """One process's life: a queue on the journal, an engine, a judge and a learner."""

    def __init__(self, path: Path) -> None:
        config = QueueConfig(groups_per_step=2, group_size=2, steps=4, max_lag=1)
        self.queue = ReplayQueue(config, Source(), seed=0, journal=LineJournal(path))
        self.generated = 0
        self.requests = 0
        self.trained: Counter[int] = Counter()

    async def begin(self) -> None:
        self.engine = await self.queue.join(ENGINE, role=Role.GENERATION, slots=8)
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
            tokens_T=np.zeros(TOKENS, np.int32),
            sampled_T=np.ones(TOKENS, np.bool_),
            behaviour_logprob_T=np.zeros(TOKENS, np.float32),
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


async def a_life_until_the_kill(path: Path) -> Life:
    """Step 1 committed, step 2 trained, more groups in every earlier state; then nothing more."""
    life = Life(path)
    await life.begin()
    await life.one_step()
    await life.commit()
    await life.one_step()
    await life.generate()
    return life


def test_a_restarted_run_redoes_what_was_not_committed_and_nothing_else(tmp_path: Path) -> None:
    async def main() -> None:
        first = await a_life_until_the_kill(tmp_path / "ledger.jsonl")
        committed = set(list(first.trained)[:2])
        second = Life(tmp_path / "ledger.jsonl")
        await second.begin()
        assert (second.resumption.step, second.resumption.directory) == (1, "step_1")
        assert second.resumption.version > first.version
        while second.step < 4:
            await second.one_step()
        await second.commit()
        status = await second.queue.status()
        assert status.states["committed"] == 8
        assert not committed & set(second.trained)
        assert set(second.trained.values()) == {1}
        assert set(second.trained) | committed == set(range(8))
        assert status.tokens["unaccounted"] == 0
        assert status.tokens["trained"] == 8 * 2 * TOKENS
        assert status.tokens["failed:lost"] > 0

    asyncio.run(main())


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    async def main() -> None:
        path = tmp_path / "ledger.jsonl"
        await a_life_until_the_kill(path)
        whole = path.read_bytes()
        path.write_bytes(whole + b'{"op":"comm')
        second = Life(path)
        await second.begin()
        assert second.resumption.step == 1
        assert path.read_bytes().startswith(whole)
        assert b'{"op":"comm{' not in path.read_bytes()

    asyncio.run(main())


def test_a_location_of_an_earlier_life_is_never_given_out_again(tmp_path: Path) -> None:
    first = LineJournal(tmp_path / "ledger.jsonl")
    assert list(first.records()) == []
    (old,) = first.store(b"old", [0])
    first.append({"op": "generated", "rows": [[0, 0, 6, [], list(old)]]})
    first.flush()
    second = LineJournal(tmp_path / "ledger.jsonl")
    assert len(list(second.records())) == 1
    assert not second.holds(old)
    (new,) = second.store(b"new", [0])
    assert new != old
    assert second.holds(new)


def test_a_fresh_journal_changes_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        life = Life(tmp_path / "ledger.jsonl")
        await life.begin()
        assert (life.resumption.step, life.resumption.version, life.resumption.directory) == (0, 0, None)

    asyncio.run(main())


def test_an_ended_life_that_is_thrown_away_late_leaves_the_next_ones_records_alone(tmp_path: Path) -> None:
    """As where a run fails and is resumed in one process."""
    path = tmp_path / "ledger.jsonl"

    async def scenario() -> None:
        first = Life(path)
        await first.begin()
        await first.queue.heartbeat(ENGINE, epoch=first.engine, progress={}, generated=7)
        second = Life(path)
        await second.begin()
        await second.generate()
        del first
        gc.collect()
        assert all(json.loads(line) for line in path.read_bytes().splitlines())
        third = await Life(path).queue.status()
        assert third.tokens["generated"] == 7 + second.generated > 7 and third.tokens["unaccounted"] == 7

    asyncio.run(scenario())
