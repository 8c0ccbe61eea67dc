"""Shapers that weigh how long a response is."""

from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from millrace.core.errors import DataError, RecipeError
from millrace.core.types import Bools, Floats, Ints

Share = Annotated[float, Field(gt=0, le=1)]


def overlong(
    reward_G: Floats,
    length_G: Ints,
    max_tokens: int,
    *,
    limit: PositiveInt | None = None,
    buffer_share: Share = 0.2,
    penalty: NonNegativeFloat = 1.0,
) -> Floats:
    """Soft overlong punishment: within a buffer below the length limit, the penalty grows linearly.

        B = buffer_share * limit
        r'_i = r_i - penalty * clip((T_i - (limit - B)) / B, 0, 1)

    Source: DAPO (Yu et al. 2025), arXiv:2503.14476, equation 13; there limit = 20480, B = 4096, penalty = 1.

    Args:
        reward_G: any unit.
        length_G: response tokens of each rollout.
        max_tokens: the longest response that sampling allows.
        limit: tokens at which the whole penalty is due; `max_tokens` if None.
        buffer_share: the buffer, as a share of `limit`.
        penalty: in units of the reward.
    Returns:
        reward_G, lowered by at most `penalty`.

    >>> overlong(np.ones(4, np.float32), np.array([8, 16, 18, 20]), 20)
    array([1. , 1. , 0.5, 0. ], dtype=float32)
    """
    most = limit if limit is not None else max_tokens
    buffer = buffer_share * most
    over_G = np.clip((length_G - (most - buffer)) / buffer, 0.0, 1.0)
    return np.asarray(reward_G - penalty * over_G, np.float32)


def truncation_penalty(reward_G: Floats, truncated_G: Bools, *, penalty: NonNegativeFloat = 1.0) -> Floats:
    """A fixed penalty for every response that was cut off at the length limit.

        r'_i = r_i - penalty * [i was cut off]

    Source: the punishment of truncated samples that DAPO (Yu et al. 2025), arXiv:2503.14476, section 3.4, softens.

    Args:
        reward_G: any unit.
        truncated_G: whether each rollout ended at the length limit.
        penalty: in units of the reward.
    Returns:
        reward_G, lowered where cut off.

    >>> truncation_penalty(np.ones(3, np.float32), np.array([False, True, False]), penalty=0.5)
    array([1. , 0.5, 1. ], dtype=float32)
    """
    return np.asarray(reward_G - penalty * truncated_G, np.float32)


def truncation_value(reward_G: Floats, truncated_G: Bools, *, value: float = 0.0) -> Floats:
    """A response that was cut off is worth a fixed value, whatever its verdict.

        r'_i = value if i was cut off, else r_i

    Source: as `truncation_penalty`: DAPO (Yu et al. 2025), arXiv:2503.14476, section 3.4.

    Args:
        reward_G: any unit.
        truncated_G: whether each rollout ended at the length limit.
        value: in units of the reward.
    Returns:
        reward_G, replaced where cut off.

    >>> truncation_value(np.ones(3, np.float32), np.array([False, True, False]))
    array([1., 0., 1.], dtype=float32)
    """
    return np.where(truncated_G, np.float32(value), reward_G).astype(np.float32)


def length_cost(reward_G: Floats, length_G: Ints, max_tokens: int, *, coefficient: NonNegativeFloat = 0.1) -> Floats:
    """Every token costs the same.

        r'_i = r_i - coefficient * T_i / max_tokens

    Source: the linear length penalty that L1 (Aggarwal and Welleck 2025), arXiv:2503.04697, starts from, with target 0.

    Args:
        reward_G: any unit.
        length_G: response tokens of each rollout.
        max_tokens: the longest response that sampling allows.
        coefficient: what a response of `max_tokens` costs, in units of the reward.
    Returns:
        reward_G, lowered by at most `coefficient`.

    >>> length_cost(np.ones(3, np.float32), np.array([0, 5, 10]), 10, coefficient=0.5)
    array([1.  , 0.75, 0.5 ], dtype=float32)
    """
    return np.asarray(reward_G - coefficient * length_G / max_tokens, np.float32)


def cosine(
    reward_G: Floats,
    length_G: Ints,
    max_tokens: int,
    *,
    threshold: float = 0.5,
    correct_short: float = 1.0,
    correct_long: float = 0.5,
    wrong_short: float = -1.0,
    wrong_long: float = 0.0,
    exceeded: float = -1.0,
) -> Floats:
    """The cosine length reward: short pays where right, long pays where wrong. It replaces the reward.

        r'_i = long + (short - long) * (1 + cos(pi * T_i / max_tokens)) / 2
        with the pair (short, long) of correct or wrong responses; exceeded where T_i >= max_tokens

    Source: Demystifying Long Chain-of-Thought Reasoning in LLMs (Yeo et al. 2025), arXiv:2502.03373; its r_0 and r_L
    for correct and wrong, and r_e, are the five values here.

    Args:
        reward_G: at least `threshold` where the response is correct.
        length_G: response tokens of each rollout.
        max_tokens: the longest response that sampling allows.
        threshold: rewards from here on count as correct.
        correct_short: of a correct response of length 0.
        correct_long: of a correct response that just ends in time.
        wrong_short: of a wrong response of length 0.
        wrong_long: of a wrong response that just ends in time.
        exceeded: of a response that does not end.
    Returns:
        reward_G, between the values given.

    >>> cosine(np.array([1, 1, 0, 0, 1], np.float32), np.array([0, 5, 0, 5, 10]), 10)
    array([ 1.  ,  0.75, -1.  , -0.5 , -1.  ], dtype=float32)
    """
    correct_G = reward_G >= threshold
    short_G = np.where(correct_G, correct_short, wrong_short)
    long_G = np.where(correct_G, correct_long, wrong_long)
    weight_G = (1.0 + np.cos(np.pi * np.asarray(length_G) / max_tokens)) / 2
    shaped_G = long_G + (short_G - long_G) * weight_G
    return np.where(np.asarray(length_G) >= max_tokens, exceeded, shaped_G).astype(np.float32)


def kimi_length(reward_G: Floats, length_G: Ints, *, threshold: float = 0.5, weight: NonNegativeFloat = 1.0) -> Floats:
    """Shorter than the others of the group pays where correct; longer costs, correct or not.

        c_i = 0.5 - (T_i - min T) / (max T - min T); 0 where all are of one length
        r'_i = r_i + weight * (c_i if correct else min(0, c_i))

    Source: Kimi k1.5 (Kimi Team 2025), arXiv:2501.12599, section 2.3.3; there its weight is warmed up, see `scheduled`.

    Args:
        reward_G: at least `threshold` where the response is correct.
        length_G: response tokens of each rollout.
        threshold: rewards from here on count as correct.
        weight: in units of the reward.
    Returns:
        reward_G, changed by at most `weight` / 2.

    >>> kimi_length(np.array([1, 1, 0, 0], np.float32), np.array([10, 30, 10, 30]))
    array([ 1.5,  0.5,  0. , -0.5], dtype=float32)
    """
    shortest, longest = np.min(length_G), np.max(length_G)
    if shortest == longest:
        return np.asarray(reward_G, np.float32)
    bonus_G = 0.5 - (length_G - shortest) / (longest - shortest)
    return np.asarray(
        reward_G + weight * np.where(reward_G >= threshold, bonus_G, np.minimum(bonus_G, 0.0)), np.float32
    )


def efficient(
    reward_G: Floats, length_G: Ints, *, threshold: float = 0.5, alpha: Share = 0.1, epsilon: PositiveFloat = 1e-6
) -> Floats:
    """Correct responses lose a share that grows with their length among the group's correct ones.

        z_i = (T_i - mean T) / (std T + epsilon) over the correct responses
        r'_i = r_i * (1 - alpha / (1 + exp(-z_i))) if correct, else r_i

    Source: Training Language Models to Reason Efficiently (Arora and Zanette 2025), arXiv:2502.04463.

    Args:
        reward_G: at least `threshold` where the response is correct.
        length_G: response tokens of each rollout.
        threshold: rewards from here on count as correct.
        alpha: the greatest share that is lost.
        epsilon: tokens; keeps the division defined where all are of one length.
    Returns:
        reward_G, unchanged where wrong.

    >>> efficient(np.array([1, 1, 0], np.float32), np.array([10, 10, 99]), alpha=0.5)
    array([0.75, 0.75, 0.  ], dtype=float32)
    """
    correct_G = reward_G >= threshold
    z_G = _standardised(length_G, correct_G, epsilon)
    kept_G = 1.0 - alpha * 0.5 * (1.0 + np.tanh(z_G / 2))  # the logistic function, which cannot overflow so
    return np.where(correct_G, reward_G * kept_G, reward_G).astype(np.float32)


def lead(
    reward_G: Floats,
    length_G: Ints,
    *,
    threshold: float = 0.5,
    alpha: NonNegativeFloat = 0.05,
    wrong: float = -1.0,
    epsilon: PositiveFloat = 1e-6,
) -> Floats:
    """Correct responses earn exponentially less the longer they are among the correct ones; wrong ones are punished.

        z_i = (T_i - mean T) / (std T + epsilon) over the correct responses
        r'_i = exp(-alpha * z_i) if correct, else wrong

    Source: GRPO-LEAD (Zhang and Zuo 2025), arXiv:2504.09696.

    Args:
        reward_G: at least `threshold` where the response is correct.
        length_G: response tokens of each rollout.
        threshold: rewards from here on count as correct.
        alpha: how strongly length counts.
        wrong: of a wrong response.
        epsilon: tokens; keeps the division defined where all are of one length.
    Returns:
        reward_G, replaced.

    >>> lead(np.array([1, 1, 0], np.float32), np.array([10, 10, 99]))
    array([ 1.,  1., -1.], dtype=float32)
    """
    correct_G = reward_G >= threshold
    return np.where(correct_G, np.exp(-alpha * _standardised(length_G, correct_G, epsilon)), wrong).astype(np.float32)


def length_target(
    reward_G: Floats,
    length_G: Ints,
    row: Mapping[str, Any],
    *,
    column: str = "tokens",
    alpha: NonNegativeFloat = 0.0003,
) -> Floats:
    """Every token away from the length that the prompt asks for costs the same: L1-Exact.

        r'_i = r_i - alpha * |n - T_i|      n = row[column]

    Source: L1 (Aggarwal and Welleck 2025), arXiv:2503.04697, LCPO-Exact.

    Args:
        reward_G: any unit.
        length_G: response tokens of each rollout.
        row: the further columns of the prompt's row.
        column: which of them holds the length asked for, in tokens.
        alpha: reward units per token.
    Returns:
        reward_G, lowered.
    Raises:
        DataError: the row lacks the column, or it holds no length.

    >>> length_target(np.ones(3, np.float32), np.array([90, 100, 120]), {"tokens": 100}, alpha=0.01)
    array([0.9, 1. , 0.8], dtype=float32)
    """
    return np.asarray(reward_G - alpha * np.abs(_asked(row, column) - length_G), np.float32)


def length_budget(
    reward_G: Floats,
    length_G: Ints,
    row: Mapping[str, Any],
    *,
    column: str = "tokens",
    alpha: NonNegativeFloat = 0.0003,
    delta: NonNegativeFloat = 0.5,
) -> Floats:
    """The reward fades softly around the length that the prompt allows: L1-Max.

        r'_i = r_i * clip(alpha * (n - T_i) + delta, 0, 1)      n = row[column]

    Source: L1 (Aggarwal and Welleck 2025), arXiv:2503.04697, LCPO-Max.

    Args:
        reward_G: at least 0, or a wrong response would gain by its length.
        length_G: response tokens of each rollout.
        row: the further columns of the prompt's row.
        column: which of them holds the length allowed, in tokens.
        alpha: share per token.
        delta: the share that is left at exactly the length allowed.
    Returns:
        reward_G, between 0 and itself.
    Raises:
        DataError: the row lacks the column, or it holds no length.
        RecipeError: a reward is negative.

    >>> length_budget(np.ones(3, np.float32), np.array([50, 100, 200]), {"tokens": 100}, alpha=0.01)
    array([1. , 0.5, 0. ], dtype=float32)
    """
    if (reward_G < 0).any():
        raise RecipeError(f"length_budget: the reward {reward_G.min():g} is negative and would rise; use length_target")
    return np.asarray(reward_G * np.clip(alpha * (_asked(row, column) - length_G) + delta, 0.0, 1.0), np.float32)


def _asked(row: Mapping[str, Any], column: str) -> float:
    value = row.get(column)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise DataError(
            f"column '{column}' of the prompt's row is {value!r}, not a length in tokens; "
            f"its further columns are {', '.join(row) or 'none'}"
        )
    return float(value)


def _standardised(length_G: Ints, among_G: Bools, epsilon: float) -> Floats:
    """Lengths in standard deviations from the mean of some of them; 0 for the others."""
    lengths = np.asarray(length_G, np.float64)[among_G]
    z_G = np.zeros(len(among_G))
    if len(lengths):
        z_G[among_G] = (lengths - lengths.mean()) / (lengths.std() + epsilon)
    return z_G.astype(np.float32)
