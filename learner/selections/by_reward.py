"""Selections by reward. Among equals the first is taken, so that a group's order decides, not chance."""

import numpy as np
from pydantic import PositiveInt

from millrace.core.types import Bools, Floats


def best(reward_G: Floats) -> Bools:
    """The rollout of the highest reward, whatever that reward is.

        keep_i = (i = argmax(r))

    Source: RAFT (Dong et al. 2023), arXiv:2304.06767, algorithm 1: the best of K.

    Args:
        reward_G: one reward per rollout, any unit, G >= 1.
    Returns:
        keep_G, True once.

    >>> best(np.array([0, 1, 1], np.float32))
    array([False,  True, False])
    """
    return np.asarray(np.arange(len(reward_G)) == np.argmax(reward_G))


def best_and_worst(reward_G: Floats) -> Bools:
    """The rollouts of the highest and of the lowest reward: a pair to compare. Equal rewards make no pair.

        keep_i = (i = argmax(r) or i = argmin(r)) and max(r) > min(r)

    Source: RLHF Workflow (Dong et al. 2024), arXiv:2405.07863, section 3: the pairs of iterative DPO.

    Args:
        reward_G: one reward per rollout, any unit, G >= 1.
    Returns:
        keep_G, True twice or never.

    >>> best_and_worst(np.array([0.5, 1, 0, 0], np.float32))
    array([False,  True,  True, False])
    """
    at_G = np.arange(len(reward_G))
    pair_G = (at_G == np.argmax(reward_G)) | (at_G == np.argmin(reward_G))
    return np.asarray(pair_G & (reward_G.max() > reward_G.min()))


def positive(reward_G: Floats, *, threshold: float = 0.0) -> Bools:
    """The rollouts whose reward exceeds a threshold: rejection sampling.

        keep_i = (r_i > threshold)

    Source: A Minimalist Approach to LLM Reasoning (Xiong et al. 2025), arXiv:2504.11343, its RAFT and RAFT++.

    Args:
        reward_G: one reward per rollout, any unit.
        threshold: in the unit of the reward; a reward equal to it is rejected.
    Returns:
        keep_G.

    >>> positive(np.array([0, 1, 0.5], np.float32), threshold=0.5)
    array([False,  True, False])
    """
    return np.asarray(reward_G > threshold)


def max_variance(reward_G: Floats, *, size: PositiveInt) -> Bools:
    """The subset of a given size whose rewards vary most: some of the highest, the others of the lowest.

        keep = argmax over subsets S, |S| = size, of var(r_i, i in S)

    The maximum is reached by the k highest and size - k lowest for some k; each k is tried. Here advantages compare
    with the whole group, in the paper with the subset.

    Source: Not All Rollouts are Useful (Xu et al. 2025), arXiv:2504.13818, PODS, max-variance down-sampling.

    Args:
        reward_G: one reward per rollout, any unit.
        size: rollouts to keep; a group that has no more keeps all.
    Returns:
        keep_G, True min(size, G) times.

    >>> max_variance(np.array([0.4, 1, 0.5, 0, 0.9], np.float32), size=2)
    array([False,  True, False,  True, False])
    """
    keep_G = np.ones(len(reward_G), np.bool_)
    if size >= len(reward_G):
        return keep_G
    order_G = np.argsort(reward_G, kind="stable")
    ascending_G = reward_G[order_G].astype(np.float64)
    middle = len(reward_G) - size  # rollouts left out: a run of this length in the order of the rewards
    variances = [np.delete(ascending_G, slice(low, low + middle)).var() for low in range(size + 1)]
    low = int(np.argmax(variances))
    keep_G[order_G[low : low + middle]] = False
    return keep_G
