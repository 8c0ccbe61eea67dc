"""Importance weights of the policy as the step began over the one that sampled, bounded per token."""

import torch
from pydantic import NonNegativeFloat, PositiveFloat


def truncated_importance(
    proximal_logprob_N: torch.Tensor, behaviour_logprob_N: torch.Tensor, *, cap: PositiveFloat = 2.0
) -> torch.Tensor:
    """The importance weight of each token, truncated from above: bounded variance, a little bias.

        weight_t = sg[min(pi_proximal(t) / mu(t), cap)] = min(exp(proximal_t - behaviour_t), cap)

    Source: IMPALA (Espeholt et al. 2018), arXiv:1802.01561, section 4.1, the truncated rho of V-trace; as the
    correction of a sampler that differs from the trainer: Your Efficient RL Framework Secretly Brings You
    Off-Policy RL Training (Yao et al. 2025).

    Args:
        proximal_logprob_N: nats, under the policy as the step began.
        behaviour_logprob_N: nats, of the distribution that sampled.
        cap: the largest weight.
    Returns:
        weight_N in (0, cap].

    >>> truncated_importance(torch.log(torch.tensor([0.3, 0.1])), torch.log(torch.tensor([0.1, 0.2])))
    tensor([2.0000, 0.5000])
    """
    return torch.exp((proximal_logprob_N - behaviour_logprob_N).detach()).clamp(max=cap)


def icepop(
    proximal_logprob_N: torch.Tensor,
    behaviour_logprob_N: torch.Tensor,
    *,
    low: NonNegativeFloat = 0.5,
    high: PositiveFloat = 5.0,
) -> torch.Tensor:
    """The importance weight of each token inside a range; tokens outside leave the gradient.

        k_t = pi_proximal(t) / mu(t)            weight_t = sg[k_t] if low <= k_t <= high else 0

    Source: Every Step Evolves (Ling Team 2025), arXiv:2510.18855, IcePop.

    Args:
        proximal_logprob_N: nats, under the policy as the step began.
        behaviour_logprob_N: nats, of the distribution that sampled.
        low: the smallest weight kept.
        high: the largest.
    Returns:
        weight_N in {0} and [low, high].

    >>> icepop(torch.log(torch.tensor([0.3, 0.6, 0.1])), torch.log(torch.tensor([0.15, 0.1, 0.4])))
    tensor([2., 0., 0.])
    """
    weight_N = torch.exp((proximal_logprob_N - behaviour_logprob_N).detach())
    return torch.where((weight_N >= low) & (weight_N <= high), weight_N, 0.0)
