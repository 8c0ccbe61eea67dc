"""Surrogates of the policy gradient: token words -> loss_N, to be minimised. Torch.

Every one is 0, and has gradient 0, wherever the advantage is 0.
"""

from millrace.learner.surrogates.clipped import cispo, clip
from millrace.learner.surrogates.unclipped import policy_gradient, reinforce

__all__ = ["cispo", "clip", "policy_gradient", "reinforce"]
