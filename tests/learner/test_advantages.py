"""learner/advantages/: golden numbers with their arithmetic, identities, and properties of the whole catalogue."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.core import catalogue
from millrace.core.types import Floats
from millrace.learner.advantages import grpo, mean_baseline, rloo
from millrace.learner.objective import Objective

NAMES = catalogue.names("millrace.learner.advantages")
REWARDS = np.array([1.0, 0.0, 0.0, 1.0, 0.5], np.float32)
GROUPS = st.lists(st.floats(-10, 10, width=16), min_size=2, max_size=9).map(lambda r: np.array(r, np.float32))


def advantages(name: str, reward_G: Floats) -> Floats:
    return Objective.of({"advantage": name}).advantages({"reward_G": reward_G, "length_G": np.ones(len(reward_G), int)})


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
    assert abs(float(advantage_G.sum())) < 1e-3


@pytest.mark.parametrize("name", NAMES)
@given(reward=st.floats(-1e4, 1e4, width=32).filter(lambda r: not math.isnan(r)), size=st.integers(2, 65))
def test_equal_rewards_carry_exactly_no_signal(name: str, reward: float, size: int) -> None:
    """0.1 summed in float32 is not 0.1 * G: divided by a deviation of 1e-9, rounding would become a signal."""
    assert not advantages(name, np.full(size, reward, np.float32)).any()
