"""Proximal policies that need no forward pass: token words -> proximal_logprob_N. Torch; no gradient."""

from millrace.learner.proximals.approximate import interpolated

__all__ = ["interpolated"]
