"""Estimators that do not compare within the group: their baseline is given, or remembered from earlier groups."""

from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
from pydantic import Field

from millrace.core.types import Floats


def reward(reward_G: Floats, *, baseline: float = 0.0) -> Floats:
    """The reward itself, less a constant.

        A_i = r_i - baseline

    Source: Tapered Off-Policy REINFORCE (Le Roux et al. 2025), arXiv:2503.14286: off-policy the constant
    decides how much the rollouts that failed weigh beside those that succeeded.

    Args:
        reward_G: one reward per rollout, any unit.
        baseline: in the unit of the reward.
    Returns:
        advantage_G, in the unit of the reward.

    >>> reward(np.array([1, 0], np.float32), baseline=0.5)
    array([ 0.5, -0.5], dtype=float32)
    """
    return np.asarray(reward_G - baseline, np.float32)


@dataclass
class moving_average:  # named as a recipe writes it
    """Reward minus an exponential moving average of the groups before: no group is compared with itself.

        A_i = r_i - b       then  b <- decay * b + (1 - decay) * mean(r)        b of the first group: its own mean

    Source: Neural Architecture Search with Reinforcement Learning (Zoph and Le 2016), arXiv:1611.01578, section 3.2.

    Args:
        reward_G: one reward per rollout, any unit, G >= 1.
        decay: what stays of the average.
        average: what it remembers; None before the first group.
    Returns:
        advantage_G, in the unit of the reward; a group of equal rewards may have a signal.

    >>> estimate = moving_average(decay=0.5)
    >>> estimate(np.array([1, 0], np.float32)), estimate(np.array([1, 1], np.float32))
    (array([ 0.5, -0.5], dtype=float32), array([0.5, 0.5], dtype=float32))
    >>> estimate.average
    0.75
    """

    decay: Annotated[float, Field(ge=0, le=1)] = 0.95
    average: float | None = field(default=None, init=False)

    def __call__(self, reward_G: Floats) -> Floats:
        mean = float(reward_G.mean(dtype=np.float64))
        average = mean if self.average is None else self.average
        self.average = self.decay * average + (1 - self.decay) * mean
        return np.asarray(reward_G - average, np.float32)
