"""learner/advantages/: golden numbers with their arithmetic, identities, and properties of the whole catalogue."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.core import catalogue
from millrace.core.types import Floats
from millrace.learner.advantages import grpo, mean_baseline, moving_average, reinforce_pp, reward, rloo
from millrace.learner.objective import Objective
from millrace.learner.sequences import Sequences

NAMES = catalogue.names("millrace.learner.advantages")
WITHIN_GROUP = ("grpo", "mean_baseline", "rloo")  # they compare a rollout with the others of its group
REWARDS = np.array([1.0, 0.0, 0.0, 1.0, 0.5], np.float32)
GROUPS = st.lists(st.floats(-10, 10, width=16), min_size=2, max_size=9).map(lambda r: np.array(r, np.float32))


def advantages(name: str, reward_G: Floats) -> Floats:
    """Of one group of rollouts of one token each, on whose probability policy and reference agree."""
    nothing_N = np.zeros(len(reward_G), np.float32)
    scored = {"proximal_logprob_N": nothing_N, "reference_logprob_N": nothing_N}
    objective = Objective.of({"advantage": name}, models=frozenset({"reference"}))
    return objective.advantages({"reward_G": reward_G, "sequences": Sequences([1] * len(reward_G)), **scored})


def test_grpo_by_hand() -> None:
    # rewards 1 0 0 0: mean 1/4; std with G - 1: sqrt((9/16 + 3/16) / 3) = 1/2; (3/4) / (1/2) = 3/2
    np.testing.assert_allclose(grpo(np.array([1, 0, 0, 0], np.float32), epsilon=1e-9), [1.5, -0.5, -0.5, -0.5])
    # rewards 3 1: mean 2; std sqrt((1 + 1) / 1) = 1.41421356; 1 / 1.41421356 = 0.70710678
    np.testing.assert_allclose(grpo(np.array([3, 1], np.float32)), [0.70710678, -0.70710678], rtol=1e-5)
    # epsilon is added to the deviation: 1 / (1.41421356 + 1) = 0.41421356
    np.testing.assert_allclose(grpo(np.array([3, 1], np.float32), epsilon=1.0), [0.41421356, -0.41421356], rtol=1e-6)


def test_rloo_by_hand() -> None:
    # rewards 1 0 2: 1 - (0 + 2)/2 = 0; 0 - (1 + 2)/2 = -1.5; 2 - (1 + 0)/2 = 1.5
    np.testing.assert_allclose(rloo(np.array([1, 0, 2], np.float32)), [0, -1.5, 1.5])


def test_mean_baseline_by_hand() -> None:
    # rewards 1 0 2: mean 1
    np.testing.assert_allclose(mean_baseline(np.array([1, 0, 2], np.float32)), [0, -1, 1])


def test_rloo_is_the_mean_baseline_times_g_over_g_minus_1() -> None:
    np.testing.assert_allclose(rloo(REWARDS), 5 / 4 * mean_baseline(REWARDS), rtol=1e-6)
    np.testing.assert_allclose(mean_baseline(REWARDS), grpo(REWARDS, divide_by_std=False), rtol=0)


def test_reward_by_hand() -> None:
    np.testing.assert_allclose(reward(np.array([1, 0, 0.5], np.float32)), [1, 0, 0.5])
    np.testing.assert_allclose(reward(np.array([1, 0, 0.5], np.float32), baseline=0.75), [0.25, -0.75, -0.25])


def test_moving_average_by_hand() -> None:
    estimate = moving_average(decay=0.75)
    # the first group: its own mean, 1/2; the average stays 1/2
    np.testing.assert_allclose(estimate(np.array([1, 0], np.float32)), [0.5, -0.5])
    # against 1/2; then 0.75 * 0.5 + 0.25 * 1 = 0.625
    np.testing.assert_allclose(estimate(np.array([1, 1], np.float32)), [0.5, 0.5])
    np.testing.assert_allclose(estimate(np.array([0, 0, 0], np.float32)), [-0.625] * 3)
    # 0.75 * 0.625 + 0.25 * 0
    assert estimate.average == 0.46875


def test_moving_average_goes_on_after_a_checkpoint() -> None:
    groups = np.random.default_rng(0).random((6, 4)).astype(np.float32)
    through, before, after = (Objective.of({"advantage": "moving_average"}) for _ in range(3))

    def of(objective: Objective, reward_G: Floats) -> list[float]:
        return objective.advantages({"reward_G": reward_G, "sequences": Sequences([1] * 4)}).tolist()

    expected = [of(through, group) for group in groups]
    got = [of(before, group) for group in groups[:3]]
    after.restore(json.loads(json.dumps(before.memory())))
    assert got + [of(after, group) for group in groups[3:]] == expected


@pytest.mark.parametrize("seed", range(5))
def test_reinforce_pp_is_the_return_of_a_reward_at_the_end_and_a_penalty_at_every_token(seed: int) -> None:
    """The definition, written as the loop that it is."""
    random, sequences = np.random.default_rng(seed), Sequences([3, 1, 7, 2])
    reward_G = random.random(4).astype(np.float32)
    proximal_N, reference_N = -random.exponential(1.0, (2, 13)).astype(np.float32)
    got = reinforce_pp(reward_G, proximal_N, reference_N, sequences, coefficient=0.3)
    expected, at = [], 0
    for length, r in zip(sequences.lengths_S.tolist(), reward_G.tolist(), strict=True):
        k_T = (proximal_N - reference_N)[at : at + length].astype(np.float64)
        step_T = [(r if t == length - 1 else 0.0) - 0.3 * k_T[t] for t in range(length)]
        expected += [sum(step_T[t:]) for t in range(length)]
        at += length
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_reinforce_pp_without_divergence_is_the_reward_on_every_token() -> None:
    log_N = -np.ones(5, np.float32)
    got = reinforce_pp(np.array([2, 3], np.float32), log_N, log_N, Sequences([2, 3]))
    np.testing.assert_array_equal(got, [2, 2, 3, 3, 3])


def test_rloo_needs_another_rollout() -> None:
    with pytest.raises(ValueError, match="rloo needs a group of at least 2 rollouts, got 1"):
        rloo(np.ones(1, np.float32))


@given(GROUPS)
def test_grpo_does_not_see_scale_or_shift(reward_G: Floats) -> None:
    if reward_G.std() > 0.1:
        np.testing.assert_allclose(grpo(4 * reward_G - 3), grpo(reward_G), atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@given(reward_G=GROUPS, seed=st.integers(0, 1000))
def test_permuting_a_group_permutes_its_advantages(name: str, reward_G: Floats, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(reward_G))
    np.testing.assert_allclose(advantages(name, reward_G[order]), advantages(name, reward_G)[order], atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
@given(reward_G=GROUPS)
def test_better_reward_never_means_less_advantage(name: str, reward_G: Floats) -> None:
    advantage_G = advantages(name, reward_G)
    assert advantage_G.dtype == np.float32 and np.isfinite(advantage_G).all()
    assert (np.diff(advantage_G[np.argsort(reward_G)]) >= -1e-5).all()
    assert name not in WITHIN_GROUP or abs(float(advantage_G.sum())) < 1e-3


@pytest.mark.parametrize("name", WITHIN_GROUP)
@given(reward=st.floats(-1e4, 1e4, width=32).filter(lambda r: not math.isnan(r)), size=st.integers(2, 65))
def test_equal_rewards_carry_exactly_no_signal(name: str, reward: float, size: int) -> None:
    """0.1 summed in float32 is not 0.1 * G: divided by a deviation of 1e-9, rounding would become a signal."""
    assert not advantages(name, np.full(size, reward, np.float32)).any()
