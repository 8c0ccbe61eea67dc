"""Weights by the age of what is learnt from, whatever its probability became."""

import torch
from pydantic import NonNegativeFloat


def age_decay(staleness_N: torch.Tensor, *, power: NonNegativeFloat = 0.5) -> torch.Tensor:
    """A weight that falls polynomially with a token's age.

        weight_t = (d_t + 1)^(-power)           d_t: versions between the weights that sampled and the policy

    Source: Asynchronous Federated Optimization (Xie et al. 2019), arXiv:1903.03934, section 5.2: its polynomial
    staleness function; with power 1 the 1 / (d + 1) of staleness-aware replay.

    Args:
        staleness_N: versions, >= 0.
        power: 0 weighs all ages the same.
    Returns:
        weight_N in (0, 1]; 1 on-policy.

    >>> age_decay(torch.tensor([0, 1, 3]), power=1.0)
    tensor([1.0000, 0.5000, 0.2500])
    """
    return (staleness_N + 1.0).pow(-power)
