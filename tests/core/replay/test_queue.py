"""The asynchronous queue, with real packs: waits, repeats, payloads, and a whole run."""

import asyncio
import inspect

import numpy as np
import pytest

from millrace.core import schema
from millrace.core.errors import Fenced, LedgerError
from millrace.core.protocols import Feedback, Queue, Role
from millrace.core.replay.config import QueueConfig
from millrace.core.replay.journal import MemoryJournal
from millrace.core.replay.leases import Leases
from millrace.core.replay.queue import ReplayQueue
from millrace.core.replay.step_rules import StepRules
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
    seed_of,
)

GENERATOR, JUDGE = WorkerId("generation-0"), WorkerId("reward-0")


class Source:
    def draw(self, index: int) -> Prompt:
        return Prompt(id=f"p{index}", text=str(index), tokens_P=np.array([index], np.int32))


def rollout(seed: int, version: int, length: int = 3) -> Rollout:
    return Rollout(
        tokens_T=np.arange(length, dtype=np.int32),
        sampled_T=np.ones(length, np.bool_),
        behaviour_logprob_T=np.zeros(length, np.float32),
        versions=(VersionRun(version, 0, length),),
        finish_reason="stop",
        seed=seed,
    )


def group_of(lease: Lease, version: int | None = None, n: int | None = None) -> Group:
    version = lease.min_version if version is None else version
    rollouts = tuple(rollout(seed, version) for seed in lease.seeds[:n])
    return Group(id=lease.id, prompt=lease.prompt, rollouts=rollouts, lease_epoch=lease.epoch)


def scored(groups: list[Group]) -> list[GroupVerdict]:
    one = Verdict(kind=VerdictKind.SCORED, score=0.5, components={"exact": 0.5}, feedback="half")
    return [GroupVerdict(id=group.id, verdicts=(one,) * len(group.rollouts)) for group in groups]


class Rig:
    """A queue with one worker of each kind, and a clock that tests turn."""

    def __init__(self, journal: MemoryJournal | None = None, now: float = 0.0, **changes: object) -> None:
        self.now = now
        base = {"groups_per_step": 2, "group_size": 2, "steps": 3, "max_lag": 1, "start_s": 10, "lease_s": 10}
        base["keep_commits"] = 1
        self.config = QueueConfig.model_validate({**base, **changes})
        self.journal = journal or MemoryJournal()
        self.queue = ReplayQueue(self.config, Source(), seed=3, clock=lambda: self.now, journal=self.journal)
        self.requests = 0

    async def start(self) -> "Rig":
        self.epoch = await self.queue.join(GENERATOR, role=Role.GENERATION, slots=8)
        self.judge = await self.queue.join(JUDGE, role=Role.REWARD, slots=8)
        self.learner = await self.queue.join_learner()
        await self.queue.announce(version=self.learner.version, epoch=self.learner.epoch)
        return self

    def request(self) -> str:
        self.requests += 1
        return f"r{self.requests}"

    async def lease(self, want: int = 1, *, version: int = 0, wait_s: float = 0.0, request: str | None = None):
        call = {"epoch": self.epoch, "version": version, "want": want, "wait_s": wait_s}
        return await self.queue.lease_draws(GENERATOR, request=request or self.request(), **call)

    async def put(self, *groups: Group, request: str | None = None):
        pack = schema.encode(list(groups))
        return await self.queue.put_groups(GENERATOR, epoch=self.epoch, pack=pack, request=request or self.request())

    async def judged(self, want: int = 8) -> list[Group]:
        call = {"epoch": self.judge, "want": want, "request": self.request(), "wait_s": 0.0}
        pack = await self.queue.lease_groups(JUDGE, **call)
        groups = schema.decode(pack) if pack else []
        await self.queue.put_verdicts(JUDGE, epoch=self.judge, verdicts=scored(groups), request=self.request())
        return groups

    async def fill(self, count: int, version: int = 0) -> None:
        grant = await self.lease(count, version=version)
        await self.put(*[group_of(lease) for lease in grant.leases])
        await self.judged()


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 30))


def test_a_run_from_the_first_draw_to_the_last_commit():
    async def main():
        rig = await Rig().start()
        queue, epoch, version = rig.queue, rig.learner.epoch, rig.learner.version
        for step in range(3):
            await rig.fill(4, version)
            taken = await queue.take(step=step, epoch=epoch, wait_s=0)
            groups = schema.decode(taken.pack)
            assert [g.id for g in groups] == [v.id for v in taken.verdicts]
            assert [g.prompt.id for g in groups] == [f"p{g.id.draw}" for g in groups]
            assert taken.verdicts[0].verdicts[1].components == {"exact": 0.5}
            assert all(len(lags) == 2 and max(lags) <= 1 for lags in taken.lag)
            assert taken.uses == [0, 0]
            tokens = sum(g.tokens for g in groups)
            version = await queue.trained(step=step, epoch=epoch, feedback=Feedback(trained_tokens=tokens))
            await queue.announce(version=version, epoch=epoch)
        await queue.commit(step=3, directory="step_3.1", digest="d", epoch=epoch)
        grant = await rig.lease(version=version)
        assert grant.finished and not grant.leases
        orders = await queue.heartbeat(GENERATOR, epoch=rig.epoch, progress={}, generated=36)
        assert orders.stop
        await queue.leave(GENERATOR, epoch=rig.epoch, generated=36, abandoned={})
        status = await queue.status()
        assert status.states["committed"] == 6 and sum(status.states.values()) == 6
        assert status.tokens["generated"] == status.tokens["trained"] == 36 and status.tokens["unaccounted"] == 0
        assert sum(status.lag_histogram.values()) == 12
        assert status.calls["take"] == 3 and status.committed_step == 3
        assert rig.journal.bytes == 0, "committed payloads are still held"

    run(main())


def test_it_has_the_calls_of_the_protocol():
    calls = [name for name in vars(Queue) if not name.startswith("_")]
    assert len(calls) == 19
    for name in calls:
        ours, agreed = (inspect.signature(getattr(owner, name)).parameters for owner in (ReplayQueue, Queue))
        assert list(ours.values()) == list(agreed.values()), name


def test_seeds_are_those_of_draw_variation_and_member():
    async def main():
        rig = await Rig().start()
        (lease,) = (await rig.lease()).leases
        assert lease.seeds == tuple(seed_of(3, 0, 0, member) for member in range(2))
        rig.now = 11.0
        (again,) = (await rig.lease()).leases
        assert again.id == (0, 1) and again.prompt.id == lease.prompt.id
        assert again.seeds == lease.seeds, "silence is no fault of what was sampled"
        await rig.queue.fail_groups(GENERATOR, epoch=rig.epoch, failures={again.id: "nan"}, request="f")
        (other,) = (await rig.lease()).leases
        assert other.id == (0, 2) and other.seeds == tuple(seed_of(3, 0, 1, member) for member in range(2))

    run(main())


def test_a_repeated_request_gets_the_same_answer():
    async def main():
        rig = await Rig().start()
        first, second = await rig.lease(2, request="a"), await rig.lease(2, request="a")
        assert [lease.id for lease in first.leases] == [lease.id for lease in second.leases]
        pack = group_of(first.leases[0])
        (receipt,) = await rig.put(pack, request="b")
        assert receipt.accepted and (await rig.put(pack, request="b")) == [receipt]
        (late,) = await rig.put(pack, request="c")
        assert late.accepted and "stored already" in late.reason
        call = {"epoch": rig.judge, "want": 1, "request": "d", "wait_s": 0.0}
        assert await rig.queue.lease_groups(JUDGE, **call) == await rig.queue.lease_groups(JUDGE, **call) != b""
        (verdict,) = scored([pack])
        answers = [
            await rig.queue.put_verdicts(JUDGE, epoch=rig.judge, verdicts=[verdict], request="e") for _ in range(2)
        ]
        assert answers[0] == answers[1] and answers[0][0].accepted

    run(main())


def test_calls_that_wait_are_woken_by_what_they_wait_for():
    async def main():
        rig = await Rig(max_lag=0).start()
        queue, learner = rig.queue, rig.learner.epoch
        taking = asyncio.create_task(queue.take(step=0, epoch=learner, wait_s=20))
        call = {"epoch": rig.judge, "want": 2, "wait_s": 20.0}
        judging = asyncio.create_task(queue.lease_groups(JUDGE, request="j", **call))
        grant = await rig.lease(2)
        leasing = asyncio.create_task(rig.lease(1, version=1, wait_s=20))
        await asyncio.sleep(0)
        idle = (await queue.status()).idle
        assert "0 scored groups for 2 places" in idle["learner"] and "no generated group" in idle[JUDGE]
        await rig.put(*[group_of(lease) for lease in grant.leases])
        groups = schema.decode(await judging)
        await queue.put_verdicts(JUDGE, epoch=rig.judge, verdicts=scored(groups), request="v")
        assert [g.id for g in schema.decode((await taking).pack)] == [lease.id for lease in grant.leases]
        with pytest.raises(LedgerError, match="version 1 was never reserved"):
            await leasing
        leasing = asyncio.create_task(rig.lease(1, wait_s=20))
        await asyncio.sleep(0)
        with pytest.raises(Fenced):
            await queue.join(GENERATOR, role=Role.GENERATION, slots=8)
            await leasing

    run(main())


def test_an_expired_lease_wakes_a_waiting_worker():
    async def main():
        rig = await Rig(max_lag=0, steps=1).start()
        await rig.lease(2)
        other = WorkerId("generation-1")
        epoch = await rig.queue.join(other, role=Role.GENERATION, slots=8)
        call = {"epoch": epoch, "version": 0, "want": 1, "request": "x"}
        waiting = asyncio.create_task(rig.queue.lease_draws(other, wait_s=20, **call))
        await asyncio.sleep(0)
        rig.now = 9.999
        await asyncio.sleep(0.02)
        assert not waiting.done()
        rig.now = 10.5
        await rig.queue.status()
        assert [lease.id for lease in (await waiting).leases] == [(0, 1)]

    run(main())


def test_a_grant_that_falls_short_says_why_and_what_would_help():
    async def main():
        rig = await Rig(max_lag=0).start()
        grant = await rig.lease(5)
        assert len(grant.leases) == 2
        for part in ("6 rollout slots", "step 0", "version 0 (lag 0)", "2 live groups", "max_lag = 2 would fill"):
            assert part in grant.idle, grant.idle
        empty = await rig.lease(1, version=-1)
        assert not empty.leases and "until weights are loaded" in empty.idle

    run(main())


def test_a_long_poll_returns_empty_handed():
    async def main():
        rig = await Rig(max_lag=0).start()
        assert await rig.queue.take(step=0, epoch=rig.learner.epoch, wait_s=0.02) is None
        call = {"epoch": rig.judge, "want": 1, "request": "j", "wait_s": 0.02}
        assert await rig.queue.lease_groups(JUDGE, **call) == b""
        await rig.lease(2)
        grant = await rig.lease(1, wait_s=0.02)
        assert not grant.leases and grant.idle and not grant.finished

    run(main())


def test_groups_in_hand_cost_nothing_while_others_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds wait for slow verdicts while others are put, leased and judged, and a take waits."""
    looked: list[str] = []

    def note(table: type, method: str) -> None:
        own = getattr(table, method)

        def noted(self: object, *args: object) -> object:
            looked.append(method)
            return own(self, *args)

        monkeypatch.setattr(table, method, noted)

    note(Leases, "of")
    note(StepRules, "_candidates")

    async def main():
        rig = await Rig(groups_per_step=8, steps=16, max_lag=8).start()
        await rig.put(*[group_of(lease) for lease in (await rig.lease(32)).leases])
        held = await rig.queue.lease_groups(JUDGE, epoch=rig.judge, want=32, request=rig.request(), wait_s=0)
        assert len(schema.headers(held)) == 32
        taking = asyncio.create_task(rig.queue.take(step=0, epoch=rig.learner.epoch, wait_s=20))
        for _ in range(8):
            assert not taking.done()
            await rig.put(*[group_of(lease) for lease in (await rig.lease(1)).leases])
            assert len(await rig.judged(1)) == 1
            await asyncio.sleep(0)
        assert len((await taking).lag) == 8
        assert looked == ["_candidates"], "ordered once, when there were enough of them"

    run(main())


def test_finish_stops_everyone():
    async def main():
        rig = await Rig(max_lag=0).start()
        await rig.lease(2)
        waiting = asyncio.create_task(rig.lease(1, wait_s=20))
        await asyncio.sleep(0)
        await rig.queue.finish()
        assert (await waiting).finished
        orders = await rig.queue.heartbeat(GENERATOR, epoch=rig.epoch, progress={}, generated=0)
        assert orders.stop

    run(main())


def test_the_queue_restarts_from_its_journal():
    async def main():
        journal = MemoryJournal(keep_records=True)
        rig = await Rig(journal).start()
        await rig.fill(3)
        before = await rig.queue.take(step=0, epoch=rig.learner.epoch, wait_s=0)
        grant = await rig.lease(1, request="lost reply")
        reborn = Rig(journal, now=500.0)
        reborn.epoch, reborn.judge, reborn.learner = rig.epoch, rig.judge, rig.learner
        assert await reborn.queue.take(step=0, epoch=rig.learner.epoch, wait_s=0) == before
        again = await reborn.lease(1, request="lost reply")
        assert [(x.id, x.seeds) for x in again.leases] == [(x.id, x.seeds) for x in grant.leases]
        (receipt,) = await reborn.put(group_of(grant.leases[0]))
        assert receipt.accepted

    run(main())


def test_every_use_of_a_group_has_its_payload_also_after_a_restart():
    async def main():
        journal = MemoryJournal(keep_records=True)
        rig = await Rig(journal, reuse=2, max_lag=4, steps=4).start()
        epoch, version, packs = rig.learner.epoch, 0, []
        for step in range(4):
            await rig.fill(4, version)
            taken = await rig.queue.take(step=step, epoch=epoch, wait_s=0)
            reborn = Rig(journal, reuse=2, max_lag=4, steps=4)
            assert await reborn.queue.take(step=step, epoch=epoch, wait_s=0) == taken
            packs.append(
                [(group.id.draw, use) for group, use in zip(schema.decode(taken.pack), taken.uses, strict=True)]
            )
            version = await rig.queue.trained(step=step, epoch=epoch, feedback=Feedback(trained_tokens=12))
            await rig.queue.announce(version=version, epoch=epoch)
            await rig.queue.commit(step=step + 1, directory=f"step_{step + 1}.1", digest="d", epoch=epoch)
        assert sorted(use for pack in packs for use in pack) == [(draw, use) for draw in range(4) for use in range(2)]
        assert journal.bytes == 0, "payloads of the last uses are still held"
        status = await rig.queue.status()
        assert status.tokens["trained"] == status.tokens["reused"] == 24 and status.states["committed"] == 4
        assert sum(status.lag_histogram.values()) == 16

    run(main())


def test_payloads_of_what_is_given_up_are_freed():
    async def main():
        rig = await Rig(max_lag=0, judge_retries=0).start()
        grant = await rig.lease(2)
        await rig.put(group_of(grant.leases[0]))
        held = rig.journal.bytes
        assert held
        call = {"epoch": rig.judge, "want": 1, "request": "j", "wait_s": 0.0}
        (group,) = schema.decode(await rig.queue.lease_groups(JUDGE, **call))
        broken = Verdict(kind=VerdictKind.JUDGE_FAILED, score=None)
        verdict = GroupVerdict(id=group.id, verdicts=(broken,) * 2)
        await rig.queue.put_verdicts(JUDGE, epoch=rig.judge, verdicts=[verdict], request="v")
        assert rig.journal.bytes == 0
        assert (await rig.queue.status()).tokens["failed:judge"] == group.tokens

    run(main())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"n": 1}, "has 1 rollouts, not group_size = 2"),
        ({"version": 0}, "tokens of version 0, but was leased from 1 on"),
        ({"version": 7}, "version 7, which was never reserved"),
    ],
)
def test_a_wrong_group_is_refused_and_drawn_again(change, reason):
    async def main():
        rig = await Rig().start()
        await rig.fill(2)
        learner = rig.learner.epoch
        await rig.queue.take(step=0, epoch=learner, wait_s=0)
        version = await rig.queue.trained(step=0, epoch=learner, feedback=Feedback(trained_tokens=12))
        await rig.queue.announce(version=version, epoch=learner)
        (lease,) = (await rig.lease(version=1)).leases
        (receipt,) = await rig.put(group_of(lease, **change))
        assert not receipt.accepted and reason in receipt.reason
        (again,) = (await rig.lease(version=1)).leases
        assert again.id == (lease.id.draw, 1)
        status = await rig.queue.status()
        assert status.tokens["failed:invalid"] and status.tokens["unaccounted"] == 0

    run(main())
