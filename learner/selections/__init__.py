"""Selections: words of one group -> keep_G, which of its rollouts are learnt from. Numpy.

A rollout that is not kept leaves the loss and its denominators; advantages compare with the whole group all the same.
"""

from millrace.learner.selections.by_reward import best, best_and_worst, max_variance, positive

__all__ = ["best", "best_and_worst", "max_variance", "positive"]
