"""Losses that are not a policy gradient: token words -> loss_N. Torch; they carry the gradient."""

from millrace.learner.objectives.preference import dpo, ipo
from millrace.learner.objectives.supervised import nll

__all__ = ["dpo", "ipo", "nll"]
