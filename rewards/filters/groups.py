"""Filters that look at one group."""

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from pydantic import Field, NonNegativeFloat, PositiveInt

from millrace.core.types import Bools, Floats

Share = Annotated[float, Field(ge=0, le=1)]


def zero_variance(score_G: Floats, *, tolerance: NonNegativeFloat = 1e-6) -> bool:
    """A group that is all right or all wrong teaches nothing about the answer, whatever its lengths are.

        keep = max(score) - min(score) > tolerance

    Source: dynamic sampling of DAPO (Yu et al. 2025), arXiv:2503.14476, section 3.2; a dropped group is drawn anew.

    Args:
        score_G: the verifier's, before any shaping.
        tolerance: differences up to here are none, in units of the score.
    Returns:
        Whether to keep the group.

    >>> zero_variance(np.array([0, 1, 1], np.float32)), zero_variance(np.ones(3, np.float32))
    (True, False)
    """
    return bool(np.max(score_G) - np.min(score_G) > tolerance)


def no_signal(reward_G: Floats, *, tolerance: NonNegativeFloat = 1e-6) -> bool:
    """A group whose shaped rewards are all the same: no advantage differs from 0.

        keep = max(r) - min(r) > tolerance

    Source: dynamic sampling of DAPO (Yu et al. 2025), arXiv:2503.14476, section 3.2, on what is learnt from.

    Args:
        reward_G: any unit.
        tolerance: differences up to here are none, in units of the reward.
    Returns:
        Whether to keep the group.

    >>> no_signal(np.array([0, 1, 1], np.float32)), no_signal(np.ones(3, np.float32))
    (True, False)
    """
    return bool(np.max(reward_G) - np.min(reward_G) > tolerance)


def solve_rate_window(reward_G: Floats, *, low: Share = 0.2, high: Share = 0.8, threshold: float = 0.5) -> bool:
    """Groups of intermediate difficulty: neither almost always solved nor almost never.

        keep = low <= |{i : r_i >= threshold}| / G <= high

    Source: Online Difficulty Filtering for Reasoning Oriented Reinforcement Learning (Bae et al. 2025),
    arXiv:2504.03380; the window of online prompt filtering: PRIME (Cui et al. 2025), arXiv:2502.01456.

    Args:
        reward_G: at least `threshold` where solved.
        low: least share of solved rollouts.
        high: greatest share.
        threshold: in units of the reward.
    Returns:
        Whether to keep the group.

    >>> solve_rate_window(np.array([1, 0, 0, 0], np.float32)), solve_rate_window(np.zeros(4, np.float32))
    (True, False)
    """
    return bool(low <= np.mean(reward_G >= threshold) <= high)


def mean_window(reward_G: Floats, *, low: float = 0.1, high: float = 0.9) -> bool:
    """Groups whose mean reward lies in a window: the same for rewards that are not right or wrong.

        keep = low <= mean(r) <= high

    Source: Online Difficulty Filtering for Reasoning Oriented Reinforcement Learning (Bae et al. 2025),
    arXiv:2504.03380.

    Args:
        reward_G: any unit.
        low: least mean, in units of the reward.
        high: greatest mean.
    Returns:
        Whether to keep the group.

    >>> mean_window(np.array([0.5, 0.1], np.float32)), mean_window(np.array([1, 0.9], np.float32))
    (True, False)
    """
    return bool(low <= np.mean(reward_G, dtype=np.float64) <= high)


def variance_share(reward_G: Floats, *, at_least: Share = 0.5, lowest: float = 0.0, highest: float = 1.0) -> bool:
    """Groups whose rewards vary enough, measured by the greatest variance that is possible.

        keep = var(r) / ((highest - lowest)^2 / 4) >= at_least      var with G in the denominator

    Source: VCRL (Jiang et al. 2025), arXiv:2509.19803, its normalised group variance and threshold.

    Args:
        reward_G: between `lowest` and `highest`.
        at_least: the threshold; 1 keeps only groups of which half have either extreme.
        lowest: the least reward.
        highest: the greatest reward.
    Returns:
        Whether to keep the group.

    >>> variance_share(np.array([0, 1], np.float32)), variance_share(np.array([0.5, 1], np.float32))
    (True, False)
    """
    greatest = (highest - lowest) ** 2 / 4
    return bool(np.var(reward_G, dtype=np.float64) >= at_least * greatest)


def truncation(truncated_G: Bools, *, at_most: Share = 0.5) -> bool:
    """Groups in which too many responses were cut off compare answers that were never given.

        keep = cut off / G <= at_most

    Source: overlong filtering of DAPO (Yu et al. 2025), arXiv:2503.14476, section 3.4, for whole groups.

    Args:
        truncated_G: whether each rollout ended at the length limit.
        at_most: greatest share of them.
    Returns:
        Whether to keep the group.

    >>> truncation(np.array([True, False])), truncation(np.array([True, True]))
    (True, False)
    """
    return bool(np.mean(truncated_G) <= at_most)


def failures(failed_G: Bools, *, at_most: Share = 0.5) -> bool:
    """Groups in which too many responses could not be judged for a fault of their own teach format, not content.

        keep = failed / G <= at_most

    Source: void-turn filtering of SimpleTIR (Xue et al. 2025), arXiv:2509.02479, for responses that state no answer.

    Args:
        failed_G: whether each response could not be judged.
        at_most: greatest share of them.
    Returns:
        Whether to keep the group.

    >>> failures(np.array([True, False])), failures(np.array([True, True]))
    (True, False)
    """
    return bool(np.mean(failed_G) <= at_most)


def min_unique(text_G: Sequence[str], *, at_least: PositiveInt = 2) -> bool:
    """Groups of which too few responses differ: the policy has collapsed on this prompt.

        keep = distinct responses >= min(at_least, G)

    Source: the distinct share of A Diversity-Promoting Objective Function for Neural Conversation Models (Li et al.
    2016), arXiv:1510.03055, over whole responses.

    Args:
        text_G: the responses; white space is not compared.
        at_least: different ones.
    Returns:
        Whether to keep the group.

    >>> min_unique(["4", "four"]), min_unique(["4", " 4"])
    (True, False)
    """
    return len({" ".join(text.split()) for text in text_G}) >= min(at_least, len(text_G))
