"""What is not finite makes no step: its groups leave the batch, and nothing of it is seen in weights or memories."""

import asyncio

import numpy as np
import pytest
import torch

from millrace.core.errors import TrainingError
from millrace.core.recipe import Updates
from millrace.learner.config import OptimiserConfig
from millrace.learner.model import Policy
from millrace.learner.objective import Objective
from millrace.learner.optimiser import Optimiser
from millrace.learner.step import Interrupted, make_steps
from tests.learner.redo_world import Remembers, World
from tests.learner.test_step import micro_of

CLIPPED = {"advantage": "grpo", "surrogate": "clip", "corrections": ["truncated_importance"]}
AVERAGE = {**CLIPPED, "advantage": {"name": "moving_average", "decay": 0.5}}


def trained_ids(world: World, step: int) -> list[int]:
    """Draws of the batch that the step was made of: the last that was taken for it."""
    return [each.draw for each in [ids for _, at, ids in world.batches if at == step][-1]]


def test_the_groups_of_the_loss_leave_the_step_which_is_made_of_others(tmp_path, table_dir):
    # Small micro-batches, so that the group of draw 4 is alone in its own.
    world = World(
        tmp_path, table_dir, objective=CLIPPED, poison=frozenset({4}), config={"token_budget": 8}, steps=3
    ).run()
    (event,) = world.events
    assert event["kind"] == "step skipped" and event["step"] == 1
    assert event["groups"] == ["draw 4 attempt 0 (prompt row:1)"]
    assert "the loss is nan at step 1: draw 4 attempt 0 (prompt row:1)" in event["why"]
    assert [trained_ids(world, step) for step in range(3)] == [[0, 1, 2], [3, 5, 6], [7, 8, 9]]
    assert [step for _, step, _ in world.made] == [0, 1, 2, 3], "nothing is published for it"
    reports = asyncio.run(world.learners[0].reports(after=0))
    assert [report.filtered for report in reports] == [{}, {"non_finite": 1}, {}]
    assert [report.weights for report in reports] == [digest for _, _, digest in world.made[1:]]
    status = asyncio.run(world.queue.status())
    assert status.tokens["filtered:non_finite"] > 0


def test_weights_are_those_of_a_run_without_the_group(tmp_path, table_dir):
    """Neither moments nor the learning rate nor any memory of the objective have seen the batch that was refused."""
    config = {"schedule": "linear", "decay_steps": 20, "token_budget": 1000}
    settings = {"objective": AVERAGE, "config": config, "steps": 3}
    world = World(tmp_path / "a", table_dir, poison=frozenset({3, 4, 5}), **settings).run()
    assert [trained_ids(world, step) for step in range(3)] == [[0, 1, 2], [6, 7, 8], [9, 10, 11]]
    filtered = World(tmp_path / "b", table_dir, shaping=Without, **settings).run()
    assert trained_ids(filtered, 1) == [6, 7, 8]
    assert world.surviving() == filtered.surviving()


class Without(Remembers):
    """Filters the second batch, and shapes nothing."""

    words = frozenset({"row"})

    def shape(self, have):
        self.seen += 1
        return have["reward_G"]

    def keep(self, have):
        return "" if self.seen not in (4, 5, 6) else "second"


def test_all_groups_leave_where_the_gradient_alone_is_at_fault(tmp_path, table_dir):
    world = World(tmp_path, table_dir, objective=CLIPPED, config={"skip_gradient_above": 1e-9, "max_filtered": 2})
    with pytest.raises(TrainingError, match=r"step 0: 9 groups were filtered .*\{'gradient': 9\}.* in events.jsonl"):
        world.run()
    assert [len(event["groups"]) for event in world.events] == [3, 3, 3]
    assert all("above skip_gradient_above = 1e-09" in event["why"] for event in world.events)
    assert [step for _, step, _ in world.made] == [0]


@pytest.fixture
def policy(make_model):
    model = make_model("qwen2")
    return Policy(model), Optimiser(model.named_parameters(), OptimiserConfig(learning_rate=1e-3))


def poisoned(micro):
    micro.behaviour_logprob_N[0] = np.nan
    return micro


OBJECTIVE = Objective.of({"advantage": "grpo", "ratio": "behaviour", "surrogate": "clip"})


def test_an_update_that_is_not_finite_is_left_out_of_several(policy):
    updates = [[micro_of(0)], [micro_of(1), poisoned(micro_of(2))], [micro_of(3)]]
    steps = make_steps(policy[0], OBJECTIVE, policy[1], updates, passes=1, name=str)
    assert policy[1].steps == 2 and steps.numbers is not None
    (refused,) = steps.refused
    assert (refused.rule, refused.places) == ("non_finite", (2,))
    assert np.isfinite(steps.numbers.loss) and steps.numbers.by_lag[0].tokens == 4


def test_where_no_update_is_finite_there_are_no_numbers(policy):
    before = [p.detach().clone() for p in policy[0].model.parameters()]
    updates = [[poisoned(micro_of(0))], [poisoned(micro_of(1))]]
    steps = make_steps(policy[0], OBJECTIVE, policy[1], updates, passes=1, name=str)
    assert steps.numbers is None and [each.places for each in steps.refused] == [(0,), (1,)]
    assert policy[1].steps == 0 and all(p.grad is None for p in policy[0].model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, policy[0].model.parameters(), strict=True))


def test_a_gradient_over_the_limit_blames_every_group_that_is_in_the_loss(policy):
    steps = make_steps(
        policy[0], OBJECTIVE, policy[1], [[micro_of(0), micro_of(1)]], passes=1, name=str, refuse_above=1e-9
    )
    (refused,) = steps.refused
    assert (refused.rule, refused.places) == ("gradient", (0, 1)) and policy[1].steps == 0


def test_it_ends_between_micro_batches_until_an_update_is_made(policy):
    asked = iter([False, True])
    with pytest.raises(Interrupted):
        make_steps(
            policy[0],
            OBJECTIVE,
            policy[1],
            [[micro_of(0), micro_of(1)]],
            passes=1,
            name=str,
            interrupted=lambda: next(asked),
        )
    assert policy[1].steps == 0 and all(p.grad is None for p in policy[0].model.parameters())
    asked = iter([False])  # not again once the weights have changed
    steps = make_steps(
        policy[0],
        OBJECTIVE,
        policy[1],
        [[micro_of(0)], [micro_of(1)]],
        passes=1,
        name=str,
        interrupted=lambda: next(asked),
    )
    assert steps.numbers is not None and policy[1].steps == 2


def test_several_updates_some_of_which_are_left_out_make_the_step(tmp_path, table_dir):
    world = World(
        tmp_path, table_dir, objective=CLIPPED, poison=frozenset({4}), updates=Updates(epochs=1, minibatches=3), steps=3
    ).run()
    assert [(event["kind"], event["step"]) for event in world.events] == [("update skipped", 1)]
    assert [trained_ids(world, step) for step in range(3)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
