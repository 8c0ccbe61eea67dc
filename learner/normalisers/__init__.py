"""Normalisers: the advantages of a whole batch -> the same on another scale. Numpy, float64 inside; no gradient."""

from millrace.learner.normalisers.batch import batch_std, batch_whiten

__all__ = ["batch_std", "batch_whiten"]
