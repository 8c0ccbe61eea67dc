"""Ratios of the policy to an earlier one: token words -> ratio_N. Torch; they carry the gradient."""

from millrace.learner.ratios.importance import behaviour, behaviour_sequence, sequence, sequence_product, token

__all__ = ["behaviour", "behaviour_sequence", "sequence", "sequence_product", "token"]
