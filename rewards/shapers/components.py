"""Shapers that combine a verdict's named components, and that bound or rescale rewards."""

from collections.abc import Mapping, Sequence

import numpy as np

from millrace.core.errors import RewardError, nearest
from millrace.core.types import Bools, Floats


def weighted(
    reward_G: Floats,
    components_G: Mapping[str, Floats],
    failed_G: Bools,
    *,
    weights: dict[str, float],
    base: float = 1.0,
) -> Floats:
    """The score plus a weighted sum of the verdict's components.

        r'_i = base * r_i + sum_c weights[c] * c_i      a component that a verdict lacks counts 0

    Source: the sum of accuracy and format rewards of DeepSeek-R1 (DeepSeek-AI 2025), arXiv:2501.12948, section 2.2.2.

    Args:
        reward_G: any unit.
        components_G: the verdicts' named parts.
        failed_G: responses that could not be judged have no components.
        weights: component -> reward units per unit of it.
        base: weight of the score itself.
    Returns:
        reward_G, the sum.
    Raises:
        RewardError: no verdict of a group that was judged has such a component.

    >>> parts = {"format": np.array([1, 0], np.float32)}
    >>> weighted(np.array([1, 1], np.float32), parts, np.array([False, False]), weights={"format": 0.5})
    array([1.5, 1. ], dtype=float32)
    """
    total_G = base * np.asarray(reward_G, np.float64)
    for name, weight in weights.items():
        total_G = total_G + weight * np.nan_to_num(_component(name, components_G, failed_G, "weighted"))
    return np.asarray(total_G, np.float32)


def gate(
    reward_G: Floats,
    components_G: Mapping[str, Floats],
    failed_G: Bools,
    *,
    component: str,
    at_least: float = 1.0,
    otherwise: float = 0.0,
) -> Floats:
    """The reward counts only where a named component reaches a threshold.

        r'_i = r_i if component_i >= at_least, else otherwise

    Source: Gated Rewards (Sun et al. 2025), arXiv:2508.10548: one reward counts only when another has passed.

    Args:
        reward_G: any unit.
        components_G: the verdicts' named parts.
        failed_G: responses that could not be judged keep their reward.
        component: which part decides; a verdict that lacks it has not reached the threshold.
        at_least: the threshold, in units of the component.
        otherwise: what the others earn, in units of the reward.
    Returns:
        reward_G, replaced where the gate is closed.
    Raises:
        RewardError: no verdict of a group that was judged has such a component.

    >>> parts = {"format": np.array([1, 0], np.float32)}
    >>> gate(np.array([1, 1], np.float32), parts, np.array([False, False]), component="format")
    array([1., 0.], dtype=float32)
    """
    passed_G = _component(component, components_G, failed_G, "gate") >= at_least  # nan has not passed
    return np.where(passed_G | failed_G, reward_G, np.float32(otherwise)).astype(np.float32)


def clip(reward_G: Floats, *, low: float = -1.0, high: float = 1.0) -> Floats:
    """Rewards bounded on both sides.

        r'_i = min(max(r_i, low), high)

    Source: Playing Atari with Deep Reinforcement Learning (Mnih et al. 2013), arXiv:1312.5602, section 5.

    Args:
        reward_G: any unit.
        low: the least reward.
        high: the greatest reward.
    Returns:
        reward_G, within the bounds.
    Raises:
        RewardError: `low` is above `high`.

    >>> clip(np.array([-3, 0.5, 3], np.float32))
    array([-1. ,  0.5,  1. ], dtype=float32)
    """
    if low > high:
        raise RewardError(f"clip: low = {low:g} is above high = {high:g}")
    return np.clip(reward_G, low, high).astype(np.float32)


def affine(reward_G: Floats, *, scale: float = 1.0, shift: float = 0.0) -> Floats:
    """Rewards rescaled and shifted.

        r'_i = scale * r_i + shift

    Source: the reward rescaling examined in Deep Reinforcement Learning that Matters (Henderson et al. 2017),
    arXiv:1709.06560.

    Args:
        reward_G: any unit.
        scale: new units per old unit.
        shift: in new units.
    Returns:
        reward_G, in new units.

    >>> affine(np.array([0, 1], np.float32), scale=2.0, shift=-1.0)
    array([-1.,  1.], dtype=float32)
    """
    return np.asarray(scale * reward_G + shift, np.float32)


def _component(name: str, components_G: Mapping[str, Floats], failed_G: Sequence[bool] | Bools, whose: str) -> Floats:
    """One component; all nan in a group that failed as a whole, which has none at all."""
    if name in components_G:
        return components_G[name]
    if not np.all(failed_G):
        raise RewardError(
            f"{whose}: no verdict of this group has a component '{name}'{nearest(name, components_G) or '.'} The "
            f"verifier returned {', '.join(components_G) or 'none'}; it returns components as a mapping with 'score'"
        )
    return np.full(len(failed_G), np.nan, np.float32)
