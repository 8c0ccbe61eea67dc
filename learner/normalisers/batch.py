"""Scales that are estimated over the whole batch instead of one group."""

import numpy as np
from pydantic import PositiveFloat

from millrace.core.types import Floats, Ints
from millrace.learner.sequences import Sequences


def batch_whiten(advantage_N: Floats, *, epsilon: PositiveFloat = 1e-8) -> Floats:
    """Zero mean and unit deviation over all loss tokens of the batch.

        A_t = (A_t - mean_N(A)) / sqrt(var_N(A) + epsilon)         var with N in the denominator

    Source: REINFORCE++ (Hu et al. 2025), arXiv:2501.03262, global advantage normalisation.

    Args:
        advantage_N: of every loss token of the batch, any unit.
        epsilon: in the squared unit of the advantage; keeps a batch of equal advantages at 0.
    Returns:
        advantage_N, zero mean, in standard deviations; a token's sign may change.

    >>> batch_whiten(np.array([3, 1, 1, 3], np.float32))
    array([ 1., -1., -1.,  1.], dtype=float32)
    """
    centred_N = advantage_N - advantage_N.mean(dtype=np.float64)
    return np.asarray(centred_N / np.sqrt(centred_N.var() + epsilon), np.float32)


def batch_std(advantage_N: Floats, sequences: Sequences, group_S: Ints, *, epsilon: PositiveFloat = 1e-6) -> Floats:
    """Reward minus the mean of its group, in units of the standard deviation of ALL rewards of the batch.

        A_i = (r_i - mean_group(r)) / (std_batch(r) + epsilon)     std with S - 1 in the denominator

    Meant for advantage = "reward", whose advantages are the rewards themselves. Of advantages that are centred
    already, the deviation is that of the centred ones, which is smaller.

    Source: Tricks or Traps? (Liu et al. 2025), arXiv:2508.08221, Lite PPO: group mean, batch standard deviation.

    Args:
        advantage_N: the reward of its sequence on every loss token of the batch.
        sequences: of the batch; one without tokens is not counted.
        group_S: index of each sequence's group.
        epsilon: in the unit of the reward.
    Returns:
        advantage_N, zero mean in each group, in standard deviations of the batch.

    >>> batch_std(np.array([4, 0, 2, 2], np.float32), Sequences([1, 1, 1, 1]), np.array([0, 0, 1, 1]), epsilon=1e-12)
    array([ 1.2247449, -1.2247449,  0.       ,  0.       ], dtype=float32)
    """
    there_S = sequences.lengths_S > 0
    first_S = np.cumsum(sequences.lengths_S) - sequences.lengths_S
    reward_S = np.zeros(len(sequences))
    reward_S[there_S] = advantage_N[first_S[there_S]]  # all of its tokens have the same
    _, index_S = np.unique(group_S, return_inverse=True)
    members = np.maximum(np.bincount(index_S, weights=there_S), 1)
    mean_S = (np.bincount(index_S, weights=reward_S * there_S) / members)[index_S]
    deviation = reward_S[there_S].std(ddof=1) if there_S.sum() > 1 else 0.0
    return sequences.spread(((reward_S - mean_S) / (deviation + epsilon)).astype(np.float32))
