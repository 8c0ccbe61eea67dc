"""Off-policy corrections: token words -> weight on each token's surrogate. Torch; no gradient.

Several are multiplied: a mask beside a truncated weight is both.
"""

from millrace.learner.corrections.age import age_decay
from millrace.learner.corrections.importance import icepop, truncated_importance
from millrace.learner.corrections.sequence import (
    geometric_mask,
    off_policy_mask,
    sequence_masked_importance,
    sequence_truncated_importance,
    tapered_importance,
)

__all__ = [
    "age_decay",
    "geometric_mask",
    "icepop",
    "off_policy_mask",
    "sequence_masked_importance",
    "sequence_truncated_importance",
    "tapered_importance",
    "truncated_importance",
]
