"""Stand-ins for the policy as the step began."""

import torch


def interpolated(logprob_N: torch.Tensor, behaviour_logprob_N: torch.Tensor, staleness_N: torch.Tensor) -> torch.Tensor:
    """Between the policy that sampled and the one being trained: one version behind the latter, by interpolation.

        alpha_t = 1 / max(d_t, 1)           d_t: versions between mu and pi
        proximal_t = alpha_t * behaviour_t + (1 - alpha_t) * sg[logprob_t]

    The more versions a token is old, the nearer its proximal policy is to the one being trained. A token of the newest
    weights needs no approximation: what sampled it is the policy as the step began.

    Source: A-3PO (Li et al. 2025), arXiv:2512.06547, staleness-aware proximal policy approximation, log-linear.

    Args:
        logprob_N: nats, under the policy.
        behaviour_logprob_N: nats, under the weights that sampled.
        staleness_N: versions, >= 0.
    Returns:
        proximal_logprob_N, nats; no gradient.

    >>> interpolated(torch.full((3,), -1.0), torch.full((3,), -2.0), torch.tensor([0, 1, 4]))
    tensor([-2.0000, -2.0000, -1.2500])
    """
    alpha_N = (1.0 / staleness_N.clamp(min=1)).to(logprob_N.dtype)
    return torch.lerp(logprob_N.detach(), behaviour_logprob_N.detach(), alpha_N)
