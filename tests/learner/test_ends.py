"""How the learner's run ends: when it is told to, and when there is no room for a checkpoint."""

import asyncio
import shutil
import threading

import pytest

from millrace.core.errors import DiskFullError
from millrace.learner import checkpoint
from millrace.learner import learner as module
from tests.learner.redo_world import World
from tests.learner.table_loop import CONFIG, make

GRPO = {"advantage": "grpo", "surrogate": "clip"}


class Disk:
    """Is full for checkpoints of these steps."""

    def __init__(self, monkeypatch, steps: set[int]) -> None:
        self.steps, self.save = steps, checkpoint.save
        self.usage = shutil.disk_usage("/")
        monkeypatch.setattr(module.checkpoint, "save", self)
        monkeypatch.setattr(module.checkpoint.shutil, "disk_usage", lambda path: self.usage)

    def __call__(self, root, state, **kwargs):
        self.usage = self.usage._replace(free=1 if state.step in self.steps else 10**12)
        return self.save(root, state, **kwargs)


def names(world: World) -> list[str]:
    return sorted(path.name for path in (world.root / "checkpoints").iterdir())


def test_a_full_disk_is_said_and_the_next_checkpoint_tries_again(tmp_path, table_dir, monkeypatch):
    Disk(monkeypatch, {4})
    world = World(tmp_path, table_dir, objective=GRPO).run()
    (event,) = world.events
    assert (event["kind"], event["step"]) == ("checkpoint skipped", 4) and "and 1 are free there" in event["why"]
    assert asyncio.run(world.queue.status()).commits == [2, 6]
    assert names(world) == ["step_2.1", "step_6.1"]


def test_without_room_for_the_last_checkpoint_the_run_fails_and_the_one_before_it_stays(
    tmp_path, table_dir, monkeypatch
):
    disk = Disk(monkeypatch, {6})
    world = World(tmp_path, table_dir, objective=GRPO)
    with pytest.raises(DiskFullError, match=r"step_6\.1 cannot be written: it needs [\d,]+ bytes, and 1 are free"):
        world.run()
    assert names(world) == ["step_2.1", "step_4.1"]
    disk.steps.clear()
    world.run()
    assert world.learners[-1].policy and asyncio.run(world.queue.status()).commits == [4, 6]
    assert all(len(digests) == 1 for digests in world.digests().values()), "what could not be saved is redone"


async def ended(run: asyncio.Task) -> None:
    """It needs no time but that of other tasks: nothing that was held is let go."""
    for _ in range(200):
        await asyncio.sleep(0)
    assert run.done()
    await run


def test_stop_ends_a_wait_for_groups_at_once(tmp_path, table_dir):
    async def scenario():
        learner, queue, _ = make(tmp_path, table_dir)
        queue.hold.clear()
        run = asyncio.create_task(learner.run())
        while (await learner.status()).phase != "waiting" or "take 0" not in queue.calls:
            await asyncio.sleep(0.001)
        await learner.stop()
        # The memory of the step is put back on the learner's thread.
        await asyncio.wait_for(run, 10)
        assert not queue.hold.is_set() and queue.commits == []
        return (await learner.status()).phase

    assert asyncio.run(scenario()) == "stopped"


def test_stop_ends_the_loading_at_once(tmp_path, table_dir, monkeypatch):
    loading, go_on = threading.Event(), threading.Event()

    def slow(*args, **kwargs):
        loading.set()
        assert go_on.wait(60)

    monkeypatch.setattr(module, "load_tokenizer", slow)

    async def scenario():
        learner, queue, _ = make(tmp_path, table_dir)
        run = asyncio.create_task(learner.run())
        while not loading.is_set():
            await asyncio.sleep(0.001)
        await learner.stop()
        await ended(run)
        return queue.calls

    try:
        assert asyncio.run(scenario()) == ["join"]
    finally:
        go_on.set()


def test_stop_before_the_queue_answers_ends_at_once(tmp_path, table_dir):
    async def scenario():
        learner, queue, _ = make(tmp_path, table_dir)

        async def never():
            queue.calls.append("join")
            await asyncio.Event().wait()

        queue.join_learner = never
        run = asyncio.create_task(learner.run())
        while "join" not in queue.calls:
            await asyncio.sleep(0.001)
        await learner.stop()
        await ended(run)

    asyncio.run(scenario())


@pytest.mark.parametrize("grace_s", [0.0, 60.0])
def test_stop_while_a_step_is_computed_makes_it_only_if_it_is_short(tmp_path, table_dir, monkeypatch, grace_s):
    """Either way what was made before it is committed."""
    monkeypatch.setattr(module, "GRACE_S", grace_s)
    computing, go_on = threading.Event(), threading.Event()

    async def scenario():
        learner, queue, reports = make(tmp_path, table_dir, config=CONFIG.model_copy(update={"token_budget": 1}))
        make_steps = module.make_steps

        def slow(*args, **kwargs):
            if len(reports) == 2:
                computing.set()
                assert go_on.wait(60)
            return make_steps(*args, **kwargs)

        monkeypatch.setattr(module, "make_steps", slow)
        run = asyncio.create_task(learner.run())
        while not computing.is_set():
            await asyncio.sleep(0.001)
        await learner.stop()
        go_on.set()
        await run
        return [step for step, _, _ in queue.commits]

    assert asyncio.run(scenario()) == ([3] if grace_s else [2])
