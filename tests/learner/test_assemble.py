"""Groups to micro-batches: what is in the loss, at which row, with which weight and advantage."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from millrace.core.errors import TrainingError
from millrace.core.recipe import Updates
from millrace.core.types import VersionRun
from millrace.learner.assemble import assemble
from millrace.learner.judged import Judged, Unshaped, lags_of
from millrace.learner.model import Policy
from millrace.learner.objective import Objective

OBJECTIVE = Objective.of({"advantage": "rloo", "surrogate": "clip"})
WITH_ENTROPY = Objective.of({"advantage": "rloo", "surrogate": "clip", "penalties": ["entropy"]})


def batch_of(groups, verdicts, objective=OBJECTIVE, *, lag=None, token_budget=10_000, mask_above=None, updates=None):
    lag = lag or [[0] * sum(len(r.versions) for r in group.rollouts) for group in groups]
    found = [Judged.of(*each) for each in zip(groups, verdicts, lag, strict=True)]
    return assemble(found, objective, token_budget=token_budget, mask_above=mask_above, updates=updates)


@pytest.fixture
def two_groups(group_of, judged):
    rng = np.random.default_rng(0)
    groups = [group_of(0, 4, (3, 1, 5), rng), group_of(1, 2, (2, 6), rng)]
    return groups, [judged(groups[0], (1.0, 0.0, 0.5)), judged(groups[1], (1.0, 0.0))]


def test_the_prompt_stands_once_and_every_loss_token_is_predicted_by_the_row_before_it(two_groups):
    groups, verdicts = two_groups
    (micro,) = batch_of(groups, verdicts).updates[0]
    # The larger group comes first; the last token of each response needs no row.
    ordered = sorted(groups, key=lambda g: -len(g.prompt.tokens_P) - sum(len(r) - 1 for r in g.rollouts))
    expected, positions = [], []
    for group in ordered:
        expected += group.prompt.tokens_P.tolist()
        positions += range(len(group.prompt.tokens_P))
        for rollout in group.rollouts:
            expected += rollout.tokens_T[:-1].tolist()
            positions += range(len(group.prompt.tokens_P), len(group.prompt.tokens_P) + len(rollout) - 1)
    assert micro.token_C.tolist() == expected and micro.position_C.tolist() == positions
    at = 0
    for group in ordered:
        for rollout in group.rollouts:
            context = [*group.prompt.tokens_P, *rollout.tokens_T]
            for place in range(len(rollout)):
                row = micro.row_N[at]
                assert micro.token_C[row] == context[len(group.prompt.tokens_P) + place - 1]
                assert micro.position_C[row] == len(group.prompt.tokens_P) + place - 1
                assert micro.token_N[at] == rollout.tokens_T[place]
                assert micro.behaviour_logprob_N[at] == rollout.behaviour_logprob_T[place]
                at += 1
    assert at == len(micro.row_N) == 17


def test_advantages_are_those_of_valid_members_only(two_groups, judged):
    groups, _ = two_groups
    verdicts = [judged(groups[0], (1.0, None, 0.0)), judged(groups[1], (1.0, 0.0))]
    batch = batch_of(groups, verdicts)
    (micro,) = batch.updates[0]
    assert micro.sequences.lengths_S.tolist() == [3, 5, 2, 6]
    assert micro.advantage_N.tolist() == [1.0] * 3 + [-1.0] * 5 + [1.0] * 2 + [-1.0] * 6
    assert batch.invalid == 1 and batch.reward == pytest.approx(0.5)
    assert batch.scores == {"row:0": 0.5, "row:1": 0.5}
    np.testing.assert_allclose(micro.weight_N, 1 / 16)


def test_injected_and_stale_tokens_stay_context_and_leave_the_loss(group_of, judged):
    rng = np.random.default_rng(0)
    group = group_of(0, 3, (4, 5), rng, runs=[(VersionRun(7, 0, 4),), (VersionRun(4, 0, 2), VersionRun(7, 2, 5))])
    sampled_T = np.array([True, False, True, True])
    group = structs.replace(
        group, rollouts=(structs.replace(group.rollouts[0], sampled_T=sampled_T), group.rollouts[1])
    )
    batch = batch_of([group], [judged(group, (1.0, 0.0))], lag=[[0, 3, 0]], mask_above=2)
    (micro,) = batch.updates[0]
    assert micro.token_C.tolist() == [
        *group.prompt.tokens_P,
        *group.rollouts[0].tokens_T[:-1],
        *group.rollouts[1].tokens_T[:-1],
    ]
    assert micro.token_N.tolist() == [*group.rollouts[0].tokens_T[sampled_T], *group.rollouts[1].tokens_T[2:]]
    assert micro.row_N.tolist() == [2, 4, 5, 7, 8, 9]
    assert (batch.tokens, batch.masked_tokens) == (6, 2)
    unmasked = batch_of([group], [judged(group, (1.0, 0.0))], lag=[[0, 3, 0]])
    assert unmasked.updates[0][0].staleness_N.tolist() == [0, 0, 0, 3, 3, 0, 0, 0]


def test_lags_stay_with_their_members_when_one_has_no_verdict(group_of, judged):
    rng = np.random.default_rng(0)
    group = group_of(0, 3, (2, 3, 4), rng)
    batch = batch_of([group], [judged(group, (None, 1.0, 0.0))], lag=[[0, 5, 1]], mask_above=2)
    (micro,) = batch.updates[0]
    assert micro.token_N.tolist() == group.rollouts[2].tokens_T.tolist()
    assert micro.staleness_N.tolist() == [1] * 4 and micro.advantage_N.tolist() == [-1.0] * 4
    assert (batch.masked_tokens, batch.invalid, batch.skipped_groups) == (5, 1, 0)
    assert batch.tokens + batch.masked_tokens == group.tokens, "the waste ledger would not close"


def test_rows_behind_the_last_loss_token_are_not_computed(group_of, judged):
    rng = np.random.default_rng(0)
    group = group_of(0, 3, (6, 6), rng)
    sampled_T = np.array([True, True, False, False, False, False])
    group = structs.replace(group, rollouts=tuple(structs.replace(r, sampled_T=sampled_T) for r in group.rollouts))
    (micro,) = batch_of([group], [judged(group, (1.0, 0.0))]).updates[0]
    assert micro.token_C.tolist() == [
        *group.prompt.tokens_P,
        group.rollouts[0].tokens_T[0],
        group.rollouts[1].tokens_T[0],
    ]


def test_a_group_of_equal_rewards_is_skipped_and_still_counted(two_groups, judged):
    groups, _ = two_groups
    verdicts = [judged(groups[0], (1.0, 1.0, 1.0)), judged(groups[1], (1.0, 0.0))]
    skipping, keeping = batch_of(groups, verdicts), batch_of(groups, verdicts, WITH_ENTROPY)
    assert (skipping.skipped_groups, skipping.tokens, skipping.updates[0][0].groups) == (1, 17, (1,))
    assert (keeping.skipped_groups, keeping.tokens, keeping.updates[0][0].groups) == (0, 17, (0, 1))
    np.testing.assert_allclose(skipping.updates[0][0].weight_N, 1 / 17)
    everything = batch_of(groups, [judged(groups[0], (1.0,) * 3), judged(groups[1], (0.0,) * 2)])
    assert everything.updates == ((),) and everything.skipped_groups == 2


def test_skipping_changes_no_gradient(two_groups, judged, make_model):
    groups, _ = two_groups
    verdicts = [judged(groups[0], (1.0, 1.0, 1.0)), judged(groups[1], (1.0, 0.0))]
    never = replace(OBJECTIVE, zero_advantage_is_zero_loss=False)
    gradients = [gradient_of(make_model("qwen2"), batch_of(groups, verdicts, o)) for o in (OBJECTIVE, never)]
    for skipped, computed in zip(*gradients, strict=True):
        torch.testing.assert_close(skipped, computed, atol=1e-7, rtol=1e-5)


def gradient_of(model, batch) -> list[torch.Tensor]:
    policy = Policy(model)
    for micro in batch.updates[0]:
        OBJECTIVE(policy.words(micro, OBJECTIVE.needs)).value.backward()
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "prompt_mean"])
def test_the_gradient_does_not_depend_on_how_the_batch_is_cut(aggregation, group_of, judged, make_model):
    objective = Objective.of({"advantage": "grpo", "surrogate": "clip", "aggregation": aggregation})
    rng = np.random.default_rng(3)
    groups = [group_of(i, 5, rng.integers(1, 15, 4), rng) for i in range(4)]
    verdicts = [judged(group, rng.random(4).tolist()) for group in groups]
    whole, cut = (batch_of(groups, verdicts, objective, token_budget=budget) for budget in (10_000, 20))
    assert len(whole.updates[0]) == 1 and len(cut.updates[0]) > 4
    for one, many in zip(gradient_of(make_model("qwen2"), whole), gradient_of(make_model("qwen2"), cut), strict=True):
        torch.testing.assert_close(one, many, atol=2e-6, rtol=1e-4)


@given(
    st.lists(
        st.tuples(st.integers(1, 20), st.lists(st.integers(1, 30), min_size=2, max_size=6)), min_size=1, max_size=8
    ),
    st.integers(10, 80),
)
@settings(max_examples=50, deadline=None)
def test_no_token_is_lost_or_doubled_and_the_budget_holds(group_of, judged, shapes, budget):
    rng = np.random.default_rng(0)
    groups = [group_of(i, prompt, lengths, rng) for i, (prompt, lengths) in enumerate(shapes)]
    verdicts = [judged(group, [float(at) for at in range(len(group.rollouts))]) for group in groups]
    batch = batch_of(groups, verdicts, WITH_ENTROPY, token_budget=budget)
    together = np.concatenate([micro.token_N for micro in batch.updates[0]])
    every = np.concatenate([r.tokens_T for g in groups for r in g.rollouts])
    assert sorted(together) == sorted(every)
    assert sum(micro.weight_N.sum() for micro in batch.updates[0]) == pytest.approx(1, abs=1e-5)
    for micro in batch.updates[0]:
        alone = len(micro.sequences) == 1
        assert len(micro.token_C) <= budget or alone
    for group in range(len(groups)):
        rows = len(groups[group].prompt.tokens_P) + sum(len(r) - 1 for r in groups[group].rollouts)
        if rows <= budget:
            assert sum(group in micro.groups for micro in batch.updates[0]) == 1, "a group that fits stays whole"


def test_lags_follow_version_runs(group_of):
    rng = np.random.default_rng(0)
    group = group_of(5, 2, (3, 2), rng, runs=[(VersionRun(1, 0, 2), VersionRun(2, 2, 3)), (VersionRun(2, 0, 2),)])
    assert [lag_T.tolist() for lag_T in lags_of(group, [4, 3, 3])] == [[4, 4, 3], [3, 3]]
    with pytest.raises(TrainingError, match="draw 5 attempt 0: 2 lags were sent for 3 version runs"):
        lags_of(group, [4, 3])


class Shapes(Unshaped):
    """Returns what it is told."""

    def __init__(self, reward_G):
        self.reward_G = np.array(reward_G, np.float32)

    def shape(self, have):
        return self.reward_G


def shaped(group, verdict, reward_G):
    judged = Judged.of(group, verdict, [0] * len(group.rollouts))
    return judged.shaped(Shapes(reward_G), step=0, max_tokens=8, decode=lambda responses: [])


def test_verdicts_of_another_group_and_rewards_of_another_shape_are_refused(two_groups):
    groups, verdicts = two_groups
    with pytest.raises(TrainingError, match="draw 0 attempt 0 came with the 2 verdicts of draw 1 attempt 0"):
        Judged.of(groups[0], verdicts[1], [0] * 3)
    message = r"draw 1 attempt 0 \(prompt row:1\): shaping made rewards \[1.0\] of 2 scores"
    with pytest.raises(TrainingError, match=message):
        shaped(groups[1], verdicts[1], [1.0])
    with pytest.raises(TrainingError, match="one finite number per rollout"):
        shaped(groups[1], verdicts[1], [np.nan, 0.0])


BEST = Objective.of({"loss": "nll", "selection": "best", "aggregation": "sequence_mean"})


def test_what_is_not_selected_leaves_the_loss_and_its_denominator_and_is_counted(two_groups):
    groups, verdicts = two_groups
    batch = batch_of(groups, verdicts, BEST)
    (micro,) = batch.updates[0]
    assert micro.sequences.lengths_S.tolist() == [3, 2]
    assert micro.token_N.tolist() == [*groups[0].rollouts[0].tokens_T, *groups[1].rollouts[0].tokens_T]
    np.testing.assert_allclose(micro.weight_N, [1 / 6] * 3 + [1 / 4] * 2)
    assert (batch.tokens, batch.masked_tokens) == (5, 12), "the waste ledger would not close"
    assert micro.reward_S.tolist() == [1.0, 1.0]


def test_every_pass_sees_every_group_once_in_an_order_of_its_own_and_each_step_weighs_its_own(group_of, judged):
    rng = np.random.default_rng(1)
    groups = [group_of(at, 3, (2, 3), rng) for at in range(6)]
    verdicts = [judged(group, (1.0, 0.0)) for group in groups]
    batch = batch_of(groups, verdicts, updates=Updates(epochs=2, minibatches=3))
    assert len(batch.updates) == 6 and batch.tokens == 30
    orders = []
    for start in (0, 3):
        order = [group for update in batch.updates[start : start + 3] for micro in update for group in micro.groups]
        assert sorted(order) == list(range(6))
        orders.append(order)
    assert orders[0] != orders[1]
    for update in batch.updates:
        assert sum(micro.weight_N.sum() for micro in update) == pytest.approx(1, abs=1e-6)
    again = batch_of(groups, verdicts, updates=Updates(epochs=2, minibatches=3))
    assert [m.groups for u in again.updates for m in u] == [m.groups for u in batch.updates for m in u]


def test_a_group_that_an_objective_wants_whole_exceeds_the_budget_rather_than_being_split(group_of, judged):
    pairs = Objective.of({"loss": "dpo", "selection": "best_and_worst"}, models=frozenset({"reference"}))
    rng = np.random.default_rng(2)
    groups = [group_of(at, 4, (9, 9, 9), rng) for at in range(3)]
    verdicts = [judged(group, (1.0, 0.5, 0.0)) for group in groups]
    batch = batch_of(groups, verdicts, pairs, token_budget=12)
    assert [len(micro.sequences) for micro in batch.updates[0]] == [2, 2, 2]
    assert all(len(micro.groups) == 1 for micro in batch.updates[0])


def test_an_estimator_with_memory_learns_from_a_group_once_however_often_it_is_used(two_groups):
    groups, verdicts = two_groups
    objective = Objective.of({"advantage": {"name": "moving_average", "decay": 0.5}, "surrogate": "reinforce"})
    found = [
        Judged.of(group, verdict, [0] * len(group.rollouts), use)
        for group, verdict, use in zip(groups, verdicts, (0, 1), strict=True)
    ]
    found[1] = replace(found[1], reward_G=found[1].reward_G + 4)
    batch = assemble(found, objective, token_budget=10_000)
    assert objective.memory()["advantage"]["average"] == 0.5, "of the first group alone"
    assert batch.advantages[1].tolist() == [4.5] * 2 + [3.5] * 6
