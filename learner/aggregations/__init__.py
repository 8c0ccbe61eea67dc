"""Aggregations: sequences of the whole batch -> weight_N; the batch's loss is sum(weight_N * loss_N). Numpy.

Computed once for the whole batch, so that micro-batches, however they are cut, add up to it exactly. A sequence
without loss tokens is not counted where sequences are.
"""

from millrace.learner.aggregations.weights import (
    constant_length,
    prompt_mean,
    sequence_mean,
    sequence_sum,
    token_mean,
)

__all__ = ["constant_length", "prompt_mean", "sequence_mean", "sequence_sum", "token_mean"]
