"""Losses on pairs: the better and the worse of two rollouts of a group.

A pair's loss stands on every token of both rollouts, so that under sequence_mean the batch's loss is the mean over
pairs. With the selection best_and_worst each group leaves one pair or none.
"""

import numpy as np
import torch
from pydantic import PositiveFloat
from torch.nn.functional import logsigmoid

from millrace.core.types import Ints
from millrace.learner.sequences import Sequences


def dpo(
    logprob_N: torch.Tensor,
    reference_logprob_N: torch.Tensor,
    reward_S: torch.Tensor,
    group_S: Ints,
    sequences: Sequences,
    *,
    beta: PositiveFloat = 0.1,
) -> torch.Tensor:
    """Direct preference optimisation of the pair in each group.

        h = sum_t(logprob_t - reference_t)      loss = -log sigmoid(beta * (h_better - h_worse))
        d loss / d logprob_t = -+ beta * sigmoid(-beta * (h_better - h_worse))     - better, + worse

    Source: Direct Preference Optimization (Rafailov et al. 2023), arXiv:2305.18290, equation 7.

    Args:
        logprob_N: nats, under the policy; carries the gradient.
        reference_logprob_N: nats, under the reference model.
        reward_S: which of the two is better; equal rewards, or a rollout alone, are no pair and have loss 0.
        group_S: index of each sequence's group; at most two sequences have the same.
        sequences: which tokens belong together.
        beta: how closely the policy is held to the reference.
    Returns:
        loss_N >= 0, its pair's on each token; sequence_mean makes it the mean over pairs.

    >>> pair = (torch.tensor([1.0, 0.0]), np.array([0, 0]), Sequences([2, 1]))
    >>> dpo(torch.tensor([-1.0, -1.0, -3.0]), torch.tensor([-1.0, -2.0, -2.0]), *pair, beta=1.0)
    tensor([0.1269, 0.1269, 0.1269])
    """
    margin_S, paired_S = _margin(logprob_N - reference_logprob_N, reward_S, group_S, sequences)
    return sequences.spread(torch.where(paired_S, -logsigmoid(beta * margin_S), 0.0))


def ipo(
    logprob_N: torch.Tensor,
    reference_logprob_N: torch.Tensor,
    reward_S: torch.Tensor,
    group_S: Ints,
    sequences: Sequences,
    *,
    beta: PositiveFloat = 0.1,
) -> torch.Tensor:
    """Identity preference optimisation of the pair in each group: the margin is regressed, not maximised.

        h = sum_t(logprob_t - reference_t)      loss = (h_better - h_worse - 1 / (2 * beta))^2
        d loss / d logprob_t = +- 2 * (h_better - h_worse - 1 / (2 * beta))         + better, - worse

    Source: A General Theoretical Paradigm to Understand Learning from Human Preferences (Azar et al. 2023),
    arXiv:2310.12036, equation 17.

    Args:
        logprob_N: nats, under the policy; carries the gradient.
        reference_logprob_N: nats, under the reference model.
        reward_S: which of the two is better; equal rewards, or a rollout alone, are no pair and have loss 0.
        group_S: index of each sequence's group; at most two sequences have the same.
        sequences: which tokens belong together.
        beta: how closely the policy is held to the reference.
    Returns:
        loss_N >= 0, in squared nats, its pair's on each token; sequence_mean makes it the mean over pairs.

    >>> pair = (torch.tensor([1.0, 0.0]), np.array([0, 0]), Sequences([2, 1]))
    >>> ipo(torch.tensor([-1.0, -1.0, -3.0]), torch.tensor([-1.0, -2.0, -2.0]), *pair, beta=0.5)
    tensor([1., 1., 1.])
    """
    margin_S, paired_S = _margin(logprob_N - reference_logprob_N, reward_S, group_S, sequences)
    return sequences.spread(torch.where(paired_S, (margin_S - 0.5 / beta).square(), 0.0))


def _margin(
    log_ratio_N: torch.Tensor, reward_S: torch.Tensor, group_S: Ints, sequences: Sequences
) -> tuple[torch.Tensor, torch.Tensor]:
    """h_better - h_worse of each sequence's pair, and whether it has one."""
    groups, index, sizes = np.unique(group_S, return_inverse=True, return_counts=True)
    if (sizes > 2).any():
        at = int(np.argmax(sizes))
        raise ValueError(
            f"a preference loss compares two rollouts of a group, but one group brought {sizes[at]}:"
            ' add selection = "best_and_worst"'
        )
    index_S = torch.as_tensor(index, device=log_ratio_N.device)
    zero_G = reward_S.new_zeros(len(groups))
    most_G = zero_G.scatter_reduce(0, index_S, reward_S, "amax", include_self=False)
    least_G = zero_G.scatter_reduce(0, index_S, reward_S, "amin", include_self=False)
    # +1 better, -1 worse, 0 for a rollout alone and for equal rewards.
    sign_S = (reward_S > least_G[index_S]).to(log_ratio_N.dtype) - (reward_S < most_G[index_S]).to(log_ratio_N.dtype)
    margin_G = log_ratio_N.new_zeros(len(groups)).index_add(0, index_S, sign_S * sequences.sum(log_ratio_N))
    return margin_G[index_S], sign_S != 0
