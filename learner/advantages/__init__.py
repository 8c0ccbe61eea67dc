"""Advantage estimators: words of one group -> advantage_G, or advantage_N of its tokens. Numpy; no gradient."""

from millrace.learner.advantages.across_groups import moving_average, reward
from millrace.learner.advantages.group import grpo, mean_baseline, rloo
from millrace.learner.advantages.tokens import reinforce_pp

__all__ = ["grpo", "mean_baseline", "moving_average", "reinforce_pp", "reward", "rloo"]
