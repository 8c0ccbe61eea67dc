"""Surrogates without a trust region."""

import torch


def policy_gradient(ratio_N: torch.Tensor, advantage_N: torch.Tensor) -> torch.Tensor:
    """The importance-weighted policy gradient, unclipped.

        loss_t = -ratio_t * A_t                 gradient: -A_t * ratio_t * grad logprob_t

    Source: Trust Region Policy Optimization (Schulman et al. 2015), arXiv:1502.05477.

    Args:
        ratio_N: of the policy to an earlier one; carries the gradient.
        advantage_N: any unit.
    Returns:
        loss_N, in the unit of the advantage.

    >>> policy_gradient(torch.tensor([2.0, 1.0]), torch.tensor([1.0, -3.0]))
    tensor([-2.,  3.])
    """
    return -ratio_N * advantage_N


def reinforce(logprob_N: torch.Tensor, advantage_N: torch.Tensor) -> torch.Tensor:
    """The score-function gradient; takes no account of who sampled.

        loss_t = -A_t * logprob_t               gradient: -A_t * grad logprob_t

    Source: Simple statistical gradient-following algorithms (Williams 1992), doi:10.1007/BF00992696; for language
    models Back to Basics (Ahmadian et al. 2024), arXiv:2402.14740.

    Args:
        logprob_N: nats, under the policy; carries the gradient.
        advantage_N: any unit.
    Returns:
        loss_N, in nats times the unit of the advantage.

    >>> reinforce(torch.tensor([-0.5, -2.0]), torch.tensor([1.0, -3.0]))
    tensor([ 0.5000, -6.0000])
    """
    return -advantage_N * logprob_N
