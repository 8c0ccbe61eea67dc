"""Penalties beside the surrogate: token words -> loss_N, to be added. Torch; they carry the gradient."""

from millrace.learner.penalties.divergence import k1, k2, k3, k3_unbiased
from millrace.learner.penalties.exploration import entropy

__all__ = ["entropy", "k1", "k2", "k3", "k3_unbiased"]
