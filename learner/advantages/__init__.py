"""Advantage estimators: words of one group -> advantage_G. Numpy; no gradient."""

from millrace.learner.advantages.group import grpo, mean_baseline, rloo

__all__ = ["grpo", "mean_baseline", "rloo"]
