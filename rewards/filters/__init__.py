"""Filters: words of one judged group -> bool, True when it is worth learning from. All of a recipe's must agree.

A filter is a function of words, filled in by name: core/words.py, GROUP and JUDGED. Its keyword-only parameters are
what a recipe may set. Those with memory are dataclasses; see core/catalogue.py.

`reward_G` is what the shapers made of the scores, and a threshold on it is in their unit; `score_G` is the verifier's.
"""

from millrace.rewards.filters.groups import (
    failures,
    mean_window,
    min_unique,
    no_signal,
    solve_rate_window,
    truncation,
    variance_share,
    zero_variance,
)
from millrace.rewards.filters.history import mastered

__all__ = [
    "failures",
    "mastered",
    "mean_window",
    "min_unique",
    "no_signal",
    "solve_rate_window",
    "truncation",
    "variance_share",
    "zero_variance",
]
