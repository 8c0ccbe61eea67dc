"""Aggregations: sequences of the whole batch -> weight_N; the batch's loss is sum(weight_N * loss_N). Numpy.

Computed once for the whole batch, so that micro-batches, however they are cut, add up to it exactly. A sequence
without loss tokens is not counted where sequences are. Elsewhere they are called:

    here                verl                        TRL's loss_type
    token_mean          token-mean                  dapo, cispo, vespo; bnpo, of each micro-batch
    sequence_mean       seq-mean-token-mean         grpo, sapo
    sequence_sum        seq-mean-token-sum          luspo
    constant_length     seq-mean-token-sum-norm     dr_grpo
    token_sum           (Tinker's losses)
    prompt_mean         (CISPO and ScaleRL, as published)
"""

from millrace.learner.aggregations.weights import (
    constant_length,
    prompt_mean,
    sequence_mean,
    sequence_sum,
    token_mean,
    token_sum,
)

__all__ = ["constant_length", "prompt_mean", "sequence_mean", "sequence_sum", "token_mean", "token_sum"]
