"""Shapers that put rewards into units of what earlier groups earned. They remember, and the checkpoint with them."""

from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
from pydantic import Field, PositiveFloat

from millrace.core.types import Floats

Decay = Annotated[float, Field(ge=0, lt=1)]


@dataclass
class running_scale:
    """Rewards in standard deviations of all rewards so far, those of this group among them.

        n, m, s: count, mean and variance (n in the denominator) of every reward so far
        r'_i = (r_i - [centre] m) / (sqrt(s) + epsilon)

    Source: the reward scaling of Implementation Matters in Deep Policy Gradients (Engstrom et al. 2020),
    arXiv:2005.12729; mean 0 and variance 1 of rewards: Ziegler et al. 2019, arXiv:1909.08593.

    Until rewards differ they are divided by 1.

    Args:
        reward_G: any unit.
        centre: subtract the mean too.
        epsilon: in the unit of the reward.
        count: rewards so far.
        mean: of them.
        squares: sum of their squared distances from the mean.
    Returns:
        reward_G, in standard deviations.

    >>> scale = running_scale(epsilon=1e-9)
    >>> scale(np.array([0, 4], np.float32)), scale(np.array([4, 0], np.float32))
    (array([0., 2.], dtype=float32), array([2., 0.], dtype=float32))
    """

    centre: bool = False
    epsilon: PositiveFloat = 1e-6
    count: int = field(init=False, default=0)
    mean: float = field(init=False, default=0.0)
    squares: float = field(init=False, default=0.0)

    def __call__(self, reward_G: Floats) -> Floats:
        reward = np.asarray(reward_G, np.float64)
        # Chan's formula: two sets' moments make those of both, without the cancellation of summed squares.
        count = self.count + len(reward)
        away = float(reward.mean()) - self.mean
        self.squares += float(((reward - reward.mean()) ** 2).sum()) + away**2 * self.count * len(reward) / count
        self.mean += away * len(reward) / count
        self.count = count
        spread = float(np.sqrt(self.squares / count))
        scale = spread + self.epsilon if spread > 0 else 1.0
        return np.asarray((reward - (self.mean if self.centre else 0.0)) / scale, np.float32)


@dataclass
class moving_baseline:
    """Rewards less an exponential moving average of the mean reward of earlier groups.

        b = m / (1 - decay^n) over the n groups before, `initial` for the first
        r'_i = r_i - b          then m <- decay * m + (1 - decay) * mean(r)

    Source: the reinforcement baseline of REINFORCE (Williams 1992), doi:10.1007/BF00992696.

    The baseline comes from earlier groups only, so that it is independent of the rollouts it is compared with. With an
    advantage that subtracts the group's own mean it changes nothing.

    Args:
        reward_G: any unit.
        decay: how much of the average each further group leaves.
        initial: the baseline of the first group.
        groups: groups so far.
        average: m.
    Returns:
        reward_G, less the baseline.

    >>> baseline = moving_baseline(decay=0.5)
    >>> [baseline(np.full(2, r, np.float32)).tolist() for r in (1.0, 1.0, 3.0)]
    [[1.0, 1.0], [0.0, 0.0], [2.0, 2.0]]
    """

    decay: Decay = 0.99
    initial: float = 0.0
    groups: int = field(init=False, default=0)
    average: float = field(init=False, default=0.0)

    def __call__(self, reward_G: Floats) -> Floats:
        baseline = self.average / (1.0 - self.decay**self.groups) if self.groups else self.initial
        self.average = self.decay * self.average + (1.0 - self.decay) * float(np.mean(reward_G, dtype=np.float64))
        self.groups += 1
        return np.asarray(reward_G - np.float64(baseline), np.float32)
