"""How a reference model follows the policy it regularises."""

from typing import Annotated

from pydantic import Field, PositiveInt

Share = Annotated[float, Field(ge=0, le=1)]


def frozen(step: int) -> float:
    """The reference stays the model it began as.

        reference_n = reference_0

    Source: Fine-Tuning Language Models from Human Preferences (Ziegler et al. 2019), arXiv:1909.08593.

    Args:
        step: optimiser steps made, counted from 1.
    Returns:
        share in [0, 1] of the way to the policy: 0.

    >>> frozen(3)
    0.0
    """
    return 0.0


def ema(step: int, *, decay: Share = 0.99, every: PositiveInt = 1) -> float:
    """The exponential moving average of the policy's weights.

        reference_n = decay * reference_(n-1) + (1 - decay) * policy_n      at steps n that `every` divides

    Source: WARP (Rame et al. 2024), arXiv:2406.16768, its moving anchor of the divergence.

    Args:
        step: optimiser steps made, counted from 1.
        decay: what stays of the reference.
        every: steps between two moves.
    Returns:
        share in [0, 1] of the way to the policy.

    >>> [ema(step, decay=0.75, every=2) for step in (1, 2)]
    [0.0, 0.25]
    """
    return 1 - decay if step % every == 0 else 0.0


def snapshot(step: int, *, every: PositiveInt = 100) -> float:
    """The policy itself, copied every so-many steps: the divergence is to a recent policy, not to the first.

        reference_n = policy_n      at steps n that `every` divides, else reference_(n-1)

    Source: ProRL (Liu et al. 2025), arXiv:2505.24864, its reference policy reset.

    Args:
        step: optimiser steps made, counted from 1.
        every: steps between two copies.
    Returns:
        1 when it is time, else 0.

    >>> [snapshot(step, every=2) for step in (1, 2)]
    [0.0, 1.0]
    """
    return 1.0 if step % every == 0 else 0.0
