"""Corrections that weigh or leave out whole sequences: every token of a sequence has the same weight."""

import torch
from pydantic import NonNegativeFloat, PositiveFloat

from millrace.learner.sequences import Sequences


def sequence_truncated_importance(
    proximal_logprob_N: torch.Tensor,
    behaviour_logprob_N: torch.Tensor,
    sequences: Sequences,
    *,
    cap: PositiveFloat = 2.0,
) -> torch.Tensor:
    """The importance weight of the whole sequence, the product of its tokens', truncated from above.

        rho = prod_t pi_proximal(t) / mu(t)     weight_t = sg[min(rho, cap)]

    Without truncation it is unbiased for a reward of the whole sequence, where a product over no more than a token
    is not; its spread grows exponentially with the length.

    Source: Truncated Importance Sampling (Ionides 2008), doi:10.1198/106186008X320456; of sequences: When Speed
    Kills Stability (Liu et al. 2025).

    Args:
        proximal_logprob_N: nats, under the policy as the step began.
        behaviour_logprob_N: nats, of the distribution that sampled.
        sequences: which tokens belong together.
        cap: the largest weight.
    Returns:
        weight_N in [0, cap], equal within a sequence.

    >>> new_N, old_N = torch.log(torch.tensor([0.4, 0.2, 0.1])), torch.log(torch.tensor([0.1, 0.2, 0.4]))
    >>> sequence_truncated_importance(new_N, old_N, Sequences([2, 1]))
    tensor([2.0000, 2.0000, 0.2500])
    """
    return sequences.spread(_product(proximal_logprob_N, behaviour_logprob_N, sequences).clamp(max=cap))


def sequence_masked_importance(
    proximal_logprob_N: torch.Tensor,
    behaviour_logprob_N: torch.Tensor,
    sequences: Sequences,
    *,
    low: NonNegativeFloat = 0.0,
    high: PositiveFloat = 2.0,
) -> torch.Tensor:
    """The importance weight of the whole sequence inside a range; sequences outside leave the gradient.

        rho = prod_t pi_proximal(t) / mu(t)     weight_t = sg[rho] if low <= rho <= high else 0

    Source: Trust Region Masking (Li et al. 2025), arXiv:2512.23075, leaves out whole sequences; with this weight it
    is the masked importance sampling (MIS) of When Speed Kills Stability (Liu et al. 2025).

    Args:
        proximal_logprob_N: nats, under the policy as the step began.
        behaviour_logprob_N: nats, of the distribution that sampled.
        sequences: which tokens belong together.
        low: the smallest weight kept.
        high: the largest.
    Returns:
        weight_N in {0} and [low, high], equal within a sequence.

    >>> new_N, old_N = torch.log(torch.tensor([0.4, 0.2, 0.1])), torch.log(torch.tensor([0.1, 0.2, 0.4]))
    >>> sequence_masked_importance(new_N, old_N, Sequences([2, 1]))
    tensor([0.0000, 0.0000, 0.2500])
    """
    rho_S = _product(proximal_logprob_N, behaviour_logprob_N, sequences)
    return sequences.spread(torch.where((rho_S >= low) & (rho_S <= high), rho_S, 0.0))


def geometric_mask(
    proximal_logprob_N: torch.Tensor,
    behaviour_logprob_N: torch.Tensor,
    sequences: Sequences,
    *,
    low: NonNegativeFloat = 0.99,
    high: PositiveFloat = 1.01,
) -> torch.Tensor:
    """A mask, not a weight: sequences whose tokens' mean importance weight leaves a range leave the gradient.

        g = exp(mean_t(log pi_proximal(t) - log mu(t)))         weight_t = 1 if low <= g <= high else 0

    The geometric mean does not grow with the length, as the product does: one range fits all lengths.

    Source: Trust Region Masking (Li et al. 2025), arXiv:2512.23075, leaves out whole sequences; by the geometric
    mean: When Speed Kills Stability (Liu et al. 2025).

    Args:
        proximal_logprob_N: nats, under the policy as the step began.
        behaviour_logprob_N: nats, of the distribution that sampled.
        sequences: which tokens belong together.
        low: the smallest mean kept.
        high: the largest; one percent suits a sampler of the same weights, a policy that is versions older needs more.
    Returns:
        weight_N, 0 or 1, equal within a sequence.

    >>> new_N, old_N = torch.log(torch.tensor([0.4, 0.1, 0.1])), torch.log(torch.tensor([0.1, 0.4, 0.4]))
    >>> geometric_mask(new_N, old_N, Sequences([2, 1]))
    tensor([1., 1., 0.])
    """
    g_S = torch.exp(sequences.mean((proximal_logprob_N - behaviour_logprob_N).detach()))
    return sequences.spread(((g_S >= low) & (g_S <= high)).to(g_S.dtype))


def off_policy_mask(
    logprob_N: torch.Tensor,
    behaviour_logprob_N: torch.Tensor,
    advantage_N: torch.Tensor,
    sequences: Sequences,
    *,
    threshold: PositiveFloat = 0.5,
) -> torch.Tensor:
    """A mask, not a weight: what failed and has become too unlikely under the policy leaves the gradient.

        weight_t = 0 if A_t < 0 and mean over the sequence(log mu(t) - log pi(t)) > threshold else 1

    Source: DeepSeek-V3.2 (DeepSeek-AI 2025), arXiv:2512.02556, section 3.1, off-policy sequence masking.

    Args:
        logprob_N: nats, under the policy.
        behaviour_logprob_N: nats, of the distribution that sampled.
        advantage_N: any unit; only its sign is used.
        sequences: which tokens belong together.
        threshold: nats per token.
    Returns:
        weight_N, 0 or 1.

    >>> new_N, old_N = torch.tensor([-3.0, -1.0, -3.0]), torch.tensor([-1.0, -1.0, -1.0])
    >>> off_policy_mask(new_N, old_N, torch.tensor([-1.0, -1.0, 1.0]), Sequences([2, 1]))
    tensor([0., 0., 1.])
    """
    divergence_S = sequences.mean((behaviour_logprob_N - logprob_N).detach())
    dropped_N = (advantage_N < 0) & (sequences.spread(divergence_S) > threshold)
    return torch.where(dropped_N, 0.0, 1.0).to(logprob_N.dtype)


def tapered_importance(
    logprob_N: torch.Tensor, behaviour_logprob_N: torch.Tensor, advantage_N: torch.Tensor, sequences: Sequences
) -> torch.Tensor:
    """What succeeded is learnt from in full; what failed is weighed by how likely it still is, up to 1.

        rho = prod_t pi(t) / mu(t)              weight_t = 1 if A_t >= 0 else sg[min(rho, 1)]

    An unlikely success still pulls the policy towards it; an unlikely failure no longer pushes without bound.

    Source: Tapered Off-Policy REINFORCE (Le Roux et al. 2025), arXiv:2503.14286, TOPR, its canonical parameters.

    Args:
        logprob_N: nats, under the policy.
        behaviour_logprob_N: nats, of the distribution that sampled.
        advantage_N: any unit; only its sign is used.
        sequences: which tokens belong together.
    Returns:
        weight_N in [0, 1].

    >>> new_N, old_N = torch.log(torch.tensor([0.1, 0.2, 0.1])), torch.log(torch.tensor([0.4, 0.2, 0.4]))
    >>> tapered_importance(new_N, old_N, torch.tensor([-1.0, -1.0, 1.0]), Sequences([2, 1]))
    tensor([0.2500, 0.2500, 1.0000])
    """
    rho_N = sequences.spread(_product(logprob_N, behaviour_logprob_N, sequences))
    return torch.where(advantage_N < 0, rho_N.clamp(max=1.0), 1.0)


def _product(logprob_N: torch.Tensor, behaviour_logprob_N: torch.Tensor, sequences: Sequences) -> torch.Tensor:
    """rho_S, the product of the tokens' importance weights; infinite where it overflows: no bound lets that pass."""
    return torch.exp(sequences.sum((logprob_N - behaviour_logprob_N).detach()))
