"""Surrogates that bound how far one batch moves the policy."""

from typing import Annotated

import torch
from pydantic import Field, NonNegativeFloat

AboveOne = Annotated[float, Field(gt=1)]


def clip(
    ratio_N: torch.Tensor,
    advantage_N: torch.Tensor,
    *,
    low: NonNegativeFloat = 0.2,
    high: NonNegativeFloat = 0.2,
    dual: AboveOne | None = None,
) -> torch.Tensor:
    """The clipped surrogate: no gradient to a token that has moved beyond the range in its advantage's direction.

        loss_t = max(-A_t * ratio_t, -A_t * clamp(ratio_t, 1 - low, 1 + high))
        with dual, where A_t < 0:    min(loss_t, -A_t * dual)

    Source: Proximal Policy Optimization (Schulman et al. 2017), arXiv:1707.06347, equation 7; dual clip: Mastering
    Complex Control in MOBA Games (Ye et al. 2019), arXiv:1912.09729; high > low: DAPO (Yu et al. 2025),
    arXiv:2503.14476.

    Args:
        ratio_N: of the policy to an earlier one; carries the gradient.
        advantage_N: any unit.
        low: how far below 1 the ratio may push.
        high: how far above.
        dual: the ratio, > 1, beyond which a negative advantage pushes no more.
    Returns:
        loss_N, in the unit of the advantage.

    >>> clip(torch.tensor([1.5, 1.5, 0.5, 9.0]), torch.tensor([1.0, -1.0, 1.0, -1.0]), dual=3.0)
    tensor([-1.2000,  1.5000, -0.5000,  3.0000])
    """
    loss_N = torch.maximum(-advantage_N * ratio_N, -advantage_N * ratio_N.clamp(1 - low, 1 + high))
    if dual is None:
        return loss_N
    return torch.where(advantage_N < 0, torch.minimum(loss_N, -advantage_N * dual), loss_N)


def cispo(
    ratio_N: torch.Tensor,
    logprob_N: torch.Tensor,
    advantage_N: torch.Tensor,
    *,
    low: NonNegativeFloat = 1.0,
    high: NonNegativeFloat = 4.0,
) -> torch.Tensor:
    """The score-function gradient under a clipped, detached importance weight: every token keeps a gradient.

        loss_t = -sg[clamp(ratio_t, 1 - low, 1 + high)] * A_t * logprob_t

    Source: MiniMax-M1 (Chen et al. 2025), arXiv:2506.13585, equations 4 and 5.

    Args:
        ratio_N: of the policy to an earlier one; gives no gradient.
        logprob_N: nats, under the policy; carries the gradient.
        advantage_N: any unit.
        low: how far below 1 the weight may be; 1 is no bound, as the paper has it.
        high: how far above.
    Returns:
        loss_N, in nats times the unit of the advantage.

    >>> cispo(torch.tensor([9.0, 0.5]), torch.tensor([-1.0, -2.0]), torch.tensor([1.0, -1.0]), high=2.0)
    tensor([ 3., -1.])
    """
    return -ratio_N.detach().clamp(1 - low, 1 + high) * advantage_N * logprob_N
