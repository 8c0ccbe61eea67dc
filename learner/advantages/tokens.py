"""Estimators that give every token an advantage of its own."""

import numpy as np
from pydantic import NonNegativeFloat

from millrace.core.types import Floats
from millrace.learner.sequences import Sequences


def reinforce_pp(
    reward_G: Floats,
    proximal_logprob_N: Floats,
    reference_logprob_N: Floats,
    sequences: Sequences,
    *,
    coefficient: NonNegativeFloat = 0.01,
) -> Floats:
    """The reward at the last token less the divergence still to come: the return of each token, KL in the reward.

        k_t = proximal_t - reference_t          A_t = r - coefficient * sum over s >= t of k_s

    Source: REINFORCE++ (Hu et al. 2025), arXiv:2501.03262: no baseline and no discount; its normalisation is
    the normaliser batch_whiten.

    Args:
        reward_G: one reward per rollout, any unit.
        proximal_logprob_N: nats, of every response token of the group.
        reference_logprob_N: the same under the reference model.
        sequences: which tokens belong to which rollout.
        coefficient: reward units per nat.
    Returns:
        advantage_N, in the unit of the reward.

    >>> log_p_N, log_q_N = np.array([-1, -1, -1], np.float32), np.array([-2, -3, -1], np.float32)
    >>> reinforce_pp(np.array([1, 0], np.float32), log_p_N, log_q_N, Sequences([2, 1]), coefficient=0.5)
    array([-0.5,  0. ,  0. ], dtype=float32)
    """
    k_N = proximal_logprob_N.astype(np.float64) - reference_logprob_N
    past_N = np.cumsum(k_N) - k_N  # of all tokens before, those of earlier sequences among them
    ends_S = np.cumsum(sequences.lengths_S)
    until_end_S = np.concatenate([[0.0], np.cumsum(k_N)])[ends_S]
    to_come_N = np.repeat(until_end_S, sequences.lengths_S) - past_N
    return np.asarray(sequences.spread(reward_G) - coefficient * to_come_N, np.float32)
