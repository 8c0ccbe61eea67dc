"""A learner that is killed anywhere is followed by one that makes the same steps again, to the bit."""

import asyncio

import pytest

from millrace.core.recipe import Updates
from tests.learner.redo_world import Remembers, World

CLIPPED = {"advantage": "grpo", "surrogate": "clip", "corrections": ["truncated_importance"]}
FOLLOWED = {
    **CLIPPED,
    "penalties": [{"name": "k3", "coefficient": 0.1}],
    "reference": {"name": "ema", "decay": 0.7},
}
AVERAGE = {**CLIPPED, "advantage": {"name": "moving_average", "decay": 0.5}}
FOUR = Updates(epochs=2, minibatches=2)
LORA = {"lora": {"rank": 2, "alpha": 4}}

# What the learner is doing when it is killed, and how often it did it before. Checkpoints are of steps 2 and 4.
PHASES = [
    ("learner.step.before", 4),
    ("learner.step.after", 4),
    ("queue.trained", 4),
    ("weights.publish.half", 5),
    ("queue.announce", 5),
    ("learner.checkpoint.write", 2),
    ("learner.commit.before", 2),
    ("queue.commit", 2),
    ("learner.commit.after", 2),
]


def same_again(world: World, whole: World, *, steps: int) -> None:
    assert not world.kills, f"never reached: {world.kills}"
    assert {step: len(digests) for step, digests in world.digests().items()} == dict.fromkeys(range(steps + 1), 1)
    assert world.surviving() == whole.surviving()
    assert len(set(whole.surviving().values())) == steps + 1, "every step changes the weights"


@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase[0])
def test_one_kill_in_each_phase(tmp_path, table_dir, phase):
    settings = {"objective": AVERAGE, "shaping": Remembers, "updates": FOUR, "reference": table_dir}
    whole = World(tmp_path / "whole", table_dir, **settings).run()
    world = World(tmp_path / "cut", table_dir, kills=(phase,), **settings).run()
    assert len(world.learners) == 2
    same_again(world, whole, steps=6)


# Incarnation after incarnation, each a little further.
CHAIN = (
    ("learner.step.after", 1),
    ("queue.trained", 1),
    ("learner.checkpoint.write", 1),
    ("learner.commit.before", 1),
    ("learner.commit.after", 1),
    ("queue.filtered", 1),
    ("weights.publish.half", 3),
    ("queue.commit", 1),
    ("learner.step.before", 2),
)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("table", {"objective": FOLLOWED, "shaping": Remembers, "reference": True}),
        ("qwen2", {"objective": AVERAGE, "shaping": Remembers, "updates": FOUR, "reference": True}),
        ("qwen2", {"objective": FOLLOWED, "shaping": Remembers, "updates": FOUR, "reference": True}),
        ("qwen2", {"objective": FOLLOWED, "shaping": Remembers, "reference": True, "config": LORA}),
        ("qwen2", {"objective": AVERAGE, "shaping": Remembers, "reference": True, "updates": FOUR, "config": LORA}),
        ("gpt2", {"objective": AVERAGE, "shaping": Remembers, "updates": FOUR, "reference": True}),
    ],
    ids=["table-reference", "qwen2", "qwen2-reference", "lora-reference", "lora", "gpt2"],
)
def test_a_chain_of_kills(tmp_path, table_dir, model_dir, make_model, kind, settings):
    model = table_dir if kind == "table" else model_dir(make_model(kind), kind)
    settings = {**settings, "reference": model, "vocabulary": 6 if kind == "table" else 61, "steps": 7}
    whole = World(tmp_path / "whole", model, **settings).run()
    world = World(tmp_path / "cut", model, kills=CHAIN, **settings).run()
    assert len(world.learners) == len(CHAIN) + 1
    same_again(world, whole, steps=7)


def test_further_uses_are_redone_too(tmp_path, table_dir):
    """Which groups a new batch holds depends on the time; what was recorded is redone."""
    settings = {
        "objective": AVERAGE,
        "shaping": Remembers,
        "reference": table_dir,
        "updates": FOUR,
        "queue": {"reuse": 2, "max_lag": 3},
    }
    kills = (("learner.step.after", 4), ("learner.checkpoint.write", 2), ("learner.commit.before", 2))
    world = World(tmp_path, table_dir, kills=kills, steps=8, **settings).run()
    assert not world.kills
    assert all(len(digests) == 1 for digests in world.digests().values())
    assert len(world.made) > 9, "some steps were made twice"


def test_groups_whose_loss_is_not_finite_leave_the_step_again(tmp_path, table_dir):
    settings = {"objective": AVERAGE, "shaping": Remembers, "reference": table_dir, "poison": frozenset({4, 10})}
    whole = World(tmp_path / "whole", table_dir, **settings).run()
    kills = (("learner.step.after", 4), ("queue.filtered", 1), ("learner.commit.before", 1))
    world = World(tmp_path / "cut", table_dir, kills=kills, **settings).run()
    same_again(world, whole, steps=6)
    assert {event["kind"] for event in world.events} == {"step skipped"}


@pytest.mark.parametrize(
    "phase",
    [("learner.commit.after", 1), ("learner.step.after", 4), ("learner.commit.before", 2), ("learner.commit.after", 2)],
)
def test_reports_that_nobody_fetched_come_with_the_checkpoint(tmp_path, table_dir, phase):
    world = World(tmp_path, table_dir, kills=(phase,)).run()
    reports = asyncio.run(world.learners[1].reports(after=0))
    assert [report.step for report in reports] == list(range(1, 7))
    digests = world.surviving()
    assert all(report.weights == digests[report.step] for report in reports)


def test_reports_that_were_fetched_are_not_kept(tmp_path, table_dir):
    world = World(tmp_path, table_dir, fetches=2, kills=(("learner.step.after", 6),)).run()
    assert [report.step for report in asyncio.run(world.learners[1].reports(after=0))] == [3, 4, 5, 6]
