"""Where a learner begins: the last commit that is whole; what is not whole is said and given up, never loaded."""

import asyncio
from pathlib import Path

import pytest

from millrace.core.errors import CheckpointError, TrainingError
from millrace.core.protocols import Resumption
from millrace.learner.joining import join
from tests.learner.redo_world import World

GRPO = {"advantage": "grpo", "surrogate": "clip"}


def resumption(epoch: int, step: int, earlier: tuple[int, ...]) -> Resumption:
    directory = f"step_{step}.1" if step else None
    return Resumption(epoch=epoch, step=step, version=epoch, directory=directory, earlier=earlier)


def joined(damaged: set[str], steps: list[int]) -> tuple[Resumption, tuple[str, ...], list[int]]:
    """Join a ledger with these commits, newest first."""
    left, reverts = list(steps), []

    async def ask() -> Resumption:
        return resumption(len(reverts) + 1, left[0], tuple(left[1:]))

    async def verify(found: Resumption) -> None:
        if found.directory in damaged:
            raise CheckpointError(f"{found.directory} is cut")

    async def revert(found: Resumption, step: int, why: str) -> None:
        assert why == f"{found.directory} is cut" and step == left[1]
        left.pop(0)
        reverts.append(step)

    found, refused = asyncio.run(join(ask, verify=verify, revert=revert))
    return found, refused, reverts


def test_a_whole_checkpoint_is_taken_and_nothing_reverted():
    found, refused, reverts = joined(set(), [9, 6])
    assert (found.step, refused, reverts) == (9, (), [])


def test_it_falls_back_commit_by_commit_to_the_start():
    found, refused, reverts = joined({"step_9.1", "step_6.1"}, [9, 6, 0])
    assert (found.step, found.epoch, found.directory) == (0, 3, None)
    assert (refused, reverts) == (("step_9.1", "step_6.1"), [6, 0])


def test_when_none_is_left_all_are_listed():
    with pytest.raises(TrainingError, match=r"can be read:\n  step_9.1 is cut\n  step_6.1 is cut\nNothing .* deleted"):
        joined({"step_9.1", "step_6.1"}, [9, 6])


def names(world: World) -> list[str]:
    return sorted(path.name for path in (world.root / "checkpoints").glob("*"))


def damage(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


class Damaged(World):
    """Between the learners, somebody cuts these checkpoints."""

    cut: tuple[str, ...] = ()

    def reached(self, name: str) -> None:
        if name == "queue.join_learner" and len(self.learners) == 2 and self._reached[name] == 0:
            self.before = names(self)
            for each in self.cut:
                damage(self.root / "checkpoints" / each)
        super().reached(name)


def test_a_damaged_checkpoint_is_said_and_the_one_before_it_redone(tmp_path, table_dir):
    settings = {"objective": GRPO, "config": {"checkpoint_keep": 1}, "steps": 7}
    whole = World(tmp_path / "whole", table_dir, **settings).run()
    world = Damaged(tmp_path / "cut", table_dir, kills=(("learner.step.after", 6),), **settings)
    world.cut = ("step_4.1",)
    world.run()
    assert world.before == ["step_2.1", "step_4.1"], "one is kept, and what the ledger may fall back to"
    (event,) = world.events
    assert (event["kind"], event["step"], event["reverts_to"]) == ("checkpoint refused", 4, 2)
    assert event["directory"].endswith("step_4.1") and "model.safetensors is not what was written" in event["why"]
    assert [step for epoch, step, _ in world.made if epoch > 1] == [2, 3, 4, 5, 6, 7]
    assert world.surviving() == whole.surviving()
    assert all(len(digests) == 1 for digests in world.digests().values())


def test_when_all_are_damaged_nothing_is_loaded_and_nothing_deleted(tmp_path, table_dir):
    world = Damaged(tmp_path, table_dir, kills=(("learner.step.after", 6),), objective=GRPO)
    world.cut = ("step_2.1", "step_4.1")
    with pytest.raises(TrainingError, match=r"no checkpoint .*\n.*step_4.1: model.safe.*\n.*step_2.1: model.safe"):
        world.run()
    assert names(world) == ["step_2.1", "step_4.1"]
    assert {epoch for epoch, _, _ in world.made} == {1}


def test_the_first_of_all_damaged_begins_anew(tmp_path, table_dir):
    world = Damaged(tmp_path, table_dir, kills=(("learner.step.after", 4),), objective=GRPO)
    world.cut = ("step_2.1",)
    world.run()
    assert world.events[0]["reverts_to"] == 0
    assert [step for epoch, step, _ in world.made if epoch > 1] == list(range(7))
    assert all(len(digests) == 1 for digests in world.digests().values())


def test_another_model_is_refused_without_reverting(tmp_path, table_dir, model_dir, make_model):
    world = World(tmp_path, table_dir, kills=(("learner.step.after", 6),), objective=GRPO)
    real = world.reached

    def other_model(name: str) -> None:
        world.model = other
        real(name)

    other = model_dir(make_model("qwen2"), "other")
    world.reached = other_model
    with pytest.raises(TrainingError, match="step_4.1") as caught:
        world.run()
    assert not isinstance(caught.value, CheckpointError) and not world.events
    assert "resume with the model that the run was started with" in str(caught.value)
    assert asyncio.run(world.queue.status()).commits[-1] == 4
    assert names(world) == ["step_2.1", "step_4.1"]


def test_orphans_are_collected_when_a_learner_joins(tmp_path, table_dir):
    kills = (("learner.checkpoint.write", 3), ("learner.commit.before", 1), ("learner.step.before", 1))
    world = Damaged(tmp_path, table_dir, kills=kills, objective=GRPO, steps=7)
    seen = []
    real = world.reached

    def look(name: str) -> None:
        if name == "queue.take" and world._reached[name] == 0:
            seen.append(names(world))
        if name == "queue.join_learner" and len(world.learners) in (2, 3):
            seen.append(names(world))
        real(name)

    world.reached = look
    world.run()
    kept = ["step_2.1", "step_4.1"]
    assert seen[:5] == [[], [*kept, "step_6.1.partial"], kept, [*kept, "step_6.2"], kept]
    assert names(world) == ["step_2.1", "step_6.4", "step_7.4"], "the best, and what the ledger may fall back to"
