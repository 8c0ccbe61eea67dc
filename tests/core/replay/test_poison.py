"""Workers that die, prompts that poison, what is told of them, and what the learner waits for: through the queue."""

import asyncio

import pytest

from millrace.core import schema
from millrace.core.errors import DataBudgetError, Fenced, LedgerError
from millrace.core.protocols import IDLE, Role
from millrace.core.replay.journal import MemoryJournal
from tests.core.replay.test_queue import GENERATOR, JUDGE, Rig, group_of, run


async def crash(rig: Rig, times: int = 1, cause: str = "crashed") -> None:
    """The engine leases what it gets, and dies of it."""
    for _ in range(times):
        await rig.lease(8)
        await rig.queue.fence(GENERATOR, cause=cause, traceback="Segmentation fault")
        rig.epoch = await rig.queue.join(GENERATOR, role=Role.GENERATION, slots=8)


def test_a_fenced_worker_holds_nothing_and_its_draws_go_on_with_the_same_seeds():
    async def main():
        rig = await Rig().start()
        before = (await rig.lease(2)).leases
        waiting = asyncio.create_task(rig.lease(1, wait_s=20))
        await rig.queue.fence(GENERATOR, cause="hung")
        await rig.queue.fence(GENERATOR, cause="hung")
        await rig.queue.fence("generation-9", cause="crashed")
        with pytest.raises(Fenced):
            await rig.put(group_of(before[0]))
        rig.epoch = await rig.queue.join(GENERATOR, role=Role.GENERATION, slots=8)
        after = (await rig.lease(2)).leases
        assert [lease.id for lease in after] == [(0, 1), (1, 1)]
        assert [lease.seeds for lease in after] == [lease.seeds for lease in before]
        assert (await rig.queue.status()).tokens["unaccounted"] == 0
        with pytest.raises(LedgerError, match="has crashed or hung"):
            await rig.queue.fence(GENERATOR, cause="tired")
        waiting.cancel()

    run(main())


def test_a_prompt_that_crashes_engines_is_quarantined_and_its_neighbours_are_not():
    async def main():
        journal = MemoryJournal(keep_records=True)
        rig = await Rig(journal=journal, max_lag=3).start()
        await crash(rig, 2)
        grant = await rig.lease(8)
        assert [lease.id.draw for lease in grant.leases] == [0], "one suspect at a time, and none overtakes another"
        assert "one such suspect at a time" in grant.idle and "draw 1 crashed 2 times" in grant.idle
        await rig.queue.fence(GENERATOR, cause="crashed", traceback="Segmentation fault")
        rig.epoch = await rig.queue.join(GENERATOR, role=Role.GENERATION, slots=8)
        (dead,) = await rig.queue.quarantined(after=0)
        assert (dead.draw, dead.prompt, dead.cause, dead.times) == (0, "p0", "crashed", 3)
        assert dead.traceback == "Segmentation fault" and dead.workers == (GENERATOR,) * 3
        assert not await rig.queue.quarantined(after=1)
        for draw in range(1, 6):  # the others finish, one after the other
            (lease,) = (await rig.lease(8)).leases[:1]
            assert lease.id.draw == draw
            await rig.put(group_of(lease))
        status = await rig.queue.status()
        assert status.quarantined == 1 and status.states["dead"] == 1
        again = Rig(journal=journal, max_lag=3)
        assert await again.queue.quarantined(after=0) == [dead], "it does not survive a restart"

    run(main())


def test_failures_of_the_engine_on_a_prompt_are_kept_with_their_traceback():
    async def main():
        rig = await Rig(attempts=2).start()
        for number in range(2):
            (lease,) = (await rig.lease(1)).leases
            call = {"epoch": rig.epoch, "failures": {lease.id: "x" * 9000 + f"nan {number}"}}
            for request in ("a", "b"):
                await rig.queue.fail_groups(GENERATOR, request=request, **call)
        (dead,) = await rig.queue.quarantined(after=0)
        assert (dead.draw, dead.attempt, dead.cause, dead.times) == (0, 1, "engine", 2)
        assert dead.traceback.endswith("nan 1") and len(dead.traceback) == 4096
        assert (await rig.lease(1)).leases[0].id == (1, 0)

    run(main())


def test_an_answer_that_crashes_judges_is_quarantined():
    async def main():
        rig = await Rig().start()
        grant = await rig.lease(2)
        await rig.put(*[group_of(lease) for lease in grant.leases])
        for seen in ((0, 1), (0, 1), (0,)):  # from the third time on one at a time
            pack = await rig.queue.lease_groups(JUDGE, epoch=rig.judge, want=8, request=rig.request(), wait_s=0)
            assert tuple(header.id.draw for header in schema.headers(pack)) == seen
            await rig.queue.fence(JUDGE, cause="crashed", traceback="killed by the user's reward")
            rig.judge = await rig.queue.join(JUDGE, role=Role.REWARD, slots=8)
        (dead,) = await rig.queue.quarantined(after=0)
        assert (dead.draw, dead.cause, dead.times) == (0, "judge_crashed", 3)
        assert dead.traceback == "killed by the user's reward" and set(dead.workers) == {JUDGE}
        assert [group.id.draw for group in await rig.judged()] == [1]

    run(main())


def test_too_many_dead_draws_end_the_run_and_name_the_prompts():
    async def main():
        rig = await Rig(attempts=1, max_dead=2).start()
        taking = asyncio.create_task(rig.queue.take(step=0, epoch=rig.learner.epoch, wait_s=20))
        for _ in range(2):
            (lease,) = (await rig.lease(1)).leases
            await rig.queue.fail_groups(GENERATOR, epoch=rig.epoch, failures={lease.id: "nan"}, request="f")
        with pytest.raises(DataBudgetError, match=r"max_dead = 2.*draw 0 of prompt 'p0': engine, 1 times"):
            await rig.lease(1)
        with pytest.raises(DataBudgetError, match="raise loop.max_dead"):
            await taking

    run(main())


def test_what_the_learner_waited_for_adds_up():
    async def main():
        rig = await Rig(max_lag=0, lease_s=900, start_s=900).start()
        queue, call = rig.queue, {"step": 0, "epoch": rig.learner.epoch, "wait_s": 0.0}
        assert await queue.take(**call) is None
        rig.now += 3.0  # nobody has asked for draws yet
        await rig.lease(1, version=-1)
        assert (await queue.status()).idle_causes == {"learner": "weights", GENERATOR: "weights"}
        rig.now += 2.0
        grant = await rig.lease(2)
        rig.now += 7.0
        await rig.put(*[group_of(lease) for lease in grant.leases])
        assert await queue.take(**call) is None
        rig.now += 1.5
        await rig.judged()
        taken = await queue.take(**call)
        assert dict(taken.idle_s) == {"data": 10.0, "weights": 2.0, "judge": 1.5} and set(taken.idle_s) <= set(IDLE)
        rig.now += 50.0
        assert (await queue.take(**call)).idle_s == taken.idle_s, "it does not wait any more"

    run(main())


def test_a_stall_names_draw_prompt_worker_and_remedy():
    async def main():
        rig = await Rig(max_lag=0, lease_s=900, start_s=900).start()
        queue, told = rig.queue, []
        await queue.take(step=0, epoch=rig.learner.epoch, wait_s=0)
        await rig.lease(1, version=-1)
        told.append(("do not hold version 0", await queue.stalled()))
        grant = await rig.lease(2)
        progress = {grant.leases[0].id: 4}
        await queue.heartbeat(GENERATOR, epoch=rig.epoch, progress=progress, generated=4)
        rig.now += 42.0
        told.append(("draw 0 attempt 0 of prompt 'p0': leased, 4 tokens so far", await queue.stalled()))
        assert f"{GENERATOR} has had it for 42 s" in told[-1][1] and "(4 tokens) was 42 s ago" in told[-1][1]
        await rig.put(*[group_of(lease) for lease in grant.leases])
        told.append((f"it waits for a reward worker: {JUDGE}", await queue.stalled()))
        await queue.lease_groups(JUDGE, epoch=rig.judge, want=1, request="j", wait_s=0)
        await queue.lease_groups(JUDGE, epoch=rig.judge, want=1, request="k", wait_s=0)
        told.append((f"{JUDGE} has had it for 0 s", await queue.stalled()))
        await queue.fence(JUDGE, cause="crashed")
        told.append(("no reward worker has joined", await queue.stalled()))
        rig.judge = await queue.join(JUDGE, role=Role.REWARD, slots=8)
        await rig.judged()
        await queue.take(step=0, epoch=rig.learner.epoch, wait_s=0)
        rig.now += 60.0
        told.append(("the learner's last call was take, 60 s ago", await queue.stalled()))
        await queue.leave(GENERATOR, epoch=rig.epoch, generated=12, abandoned={})
        for expected, message in told:
            assert expected in message and message.startswith("step 0 of 3") and message.count("\n") < 15, message

    run(main())


def test_a_stall_without_engines_says_so():
    async def main():
        rig = Rig()
        assert "no learner has joined" in await rig.queue.stalled()
        await rig.queue.join_learner()
        assert "the learner has joined" not in await rig.queue.stalled()
        await rig.queue.take(step=0, epoch=1, wait_s=0)
        message = await rig.queue.stalled()
        assert "no engine has joined" in message and "draw 0 of prompt 'p0'" in message

    run(main())


def test_a_learner_is_told_of_the_commits_it_may_fall_back_to():
    async def main():
        rig = await Rig(keep_commits=2).start()
        status = await rig.queue.status()
        assert status.commits == [0] and rig.learner.earlier == []

    run(main())
