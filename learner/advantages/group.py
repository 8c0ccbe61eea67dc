"""Estimators that compare a rollout with the others of its group.

All compute in float64: there, equal rewards minus their mean are exactly 0, so that a group without signal stays
without, whatever it is divided by.
"""

import numpy as np
from pydantic import PositiveFloat

from millrace.core.types import Floats


def grpo(reward_G: Floats, *, divide_by_std: bool = True, epsilon: PositiveFloat = 1e-6) -> Floats:
    """Reward minus the group's mean, in units of the group's standard deviation.

        A_i = (r_i - mean(r)) / (std(r) + epsilon)      std with G - 1 in the denominator

    Source: DeepSeekMath (Shao et al. 2024), arXiv:2402.03300, section 4.1.2.

    Args:
        reward_G: one reward per rollout, any unit, G >= 1; a single rollout has advantage 0.
        divide_by_std: False leaves out the division, as Dr. GRPO argues (arXiv:2503.20783).
        epsilon: in the unit of the reward.
    Returns:
        advantage_G, zero mean, in standard deviations.

    >>> grpo(np.array([1, 0, 0, 0], np.float32), epsilon=1e-12)
    array([ 1.5, -0.5, -0.5, -0.5], dtype=float32)
    """
    centred_G = reward_G - reward_G.mean(dtype=np.float64)
    if divide_by_std and len(reward_G) > 1:
        centred_G = centred_G / (centred_G.std(ddof=1) + epsilon)
    return np.asarray(centred_G, np.float32)


def mean_baseline(reward_G: Floats) -> Floats:
    """Reward minus the group's mean, in the reward's own unit.

        A_i = r_i - mean(r)

    Source: Understanding R1-Zero-Like Training (Liu et al. 2025), arXiv:2503.20783, Dr. GRPO.

    Args:
        reward_G: one reward per rollout, any unit, G >= 1.
    Returns:
        advantage_G, zero mean, in the unit of the reward.

    >>> mean_baseline(np.array([1, 0, 0, 0], np.float32))
    array([ 0.75, -0.25, -0.25, -0.25], dtype=float32)
    """
    return np.asarray(reward_G - reward_G.mean(dtype=np.float64), np.float32)


def rloo(reward_G: Floats) -> Floats:
    """Reward minus the mean of the OTHER rollouts of the group.

        A_i = r_i - mean(r_j, j != i) = G / (G - 1) * (r_i - mean(r))

    Source: Back to Basics (Ahmadian et al. 2024), arXiv:2402.14740.

    Args:
        reward_G: one reward per rollout, any unit, G >= 2.
    Returns:
        advantage_G, zero mean, in the unit of the reward; the baseline is independent of the rollout.

    >>> rloo(np.array([1, 0, 0], np.float32))
    array([ 1. , -0.5, -0.5], dtype=float32)
    """
    size = len(reward_G)
    if size < 2:
        raise ValueError(f"rloo needs a group of at least 2 rollouts, got {size}")
    return np.asarray(size / (size - 1) * (reward_G - reward_G.mean(dtype=np.float64)), np.float32)
