"""Off-policy corrections: token words -> weight on each token's surrogate. Torch; no gradient."""

from millrace.learner.corrections.importance import icepop, truncated_importance

__all__ = ["icepop", "truncated_importance"]
