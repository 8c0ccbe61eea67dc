"""Penalties that keep the policy from settling too early."""

import torch
from pydantic import NonNegativeFloat


def entropy(entropy_N: torch.Tensor, *, coefficient: NonNegativeFloat = 0.001) -> torch.Tensor:
    """The entropy bonus: a loss that falls as the policy's distribution widens.

        loss_t = -coefficient * H(pi(. | before t))

    Source: Asynchronous Methods for Deep Reinforcement Learning (Mnih et al. 2016), arXiv:1602.01783.

    Args:
        entropy_N: nats, of the distribution each token was drawn from; carries the gradient.
        coefficient: reward units per nat.
    Returns:
        loss_N <= 0.

    >>> entropy(torch.tensor([2.0, 0.5]), coefficient=0.5)
    tensor([-1.0000, -0.2500])
    """
    return -coefficient * entropy_N
