"""What a micro-batch says of itself beside its loss: means over tokens that can be merged."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

OFF_POLICY = frozenset({"importance", "importance_squared", "behaviour_kl"})  # of `off_policy`, once per batch
LARGEST_LOG_WEIGHT = 20.0  # of an importance weight, nats: their squares stay finite in float32


@dataclass(frozen=True, slots=True)
class Mean:
    """A weighted mean that can be merged.

    >>> (Mean(1.0, 1.0) + Mean(6.0, 2.0)).value
    2.3333333333333335
    """

    total: float
    weight: float

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.weight + other.weight)

    @property
    def value(self) -> float:
        """total / weight; 0 where nothing was weighed."""
        return self.total / self.weight if self.weight else 0.0


def clipped(loss_N: torch.Tensor, ratio_N: torch.Tensor, advantage_N: torch.Tensor) -> dict[str, torch.Tensor]:
    """1 where a token has an advantage (`moved`) but no gradient through its ratio (`clipped`).

    Empty where nothing can be said: without gradients, and for a surrogate that does not differentiate the ratio.
    """
    if not (ratio_N.requires_grad and loss_N.requires_grad):
        return {}
    (slope_N,) = torch.autograd.grad(loss_N.sum(), ratio_N, retain_graph=True, allow_unused=True)
    if slope_N is None:
        return {}
    moved_N = (advantage_N != 0).to(ratio_N.dtype)
    return {"clipped": moved_N * (slope_N == 0), "moved": moved_N}


def off_policy(have: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """How far the policy as the step began is from the one that sampled."""
    parts = {"entropy": have["entropy_N"]} if "entropy_N" in have else {}
    if "behaviour_logprob_N" not in have:
        return parts
    with torch.no_grad():
        log_weight_N = have["proximal_logprob_N"] - have["behaviour_logprob_N"]
        log_weight_N = log_weight_N.clamp(-LARGEST_LOG_WEIGHT, LARGEST_LOG_WEIGHT)
        weight_N = log_weight_N.exp()
        parts["importance"] = weight_N
        parts["importance_squared"] = weight_N.square()  # effective sample size: mean(w)^2 / mean(w^2)
        parts["behaviour_kl"] = weight_N - 1 - log_weight_N  # k3 estimate of KL(behaviour || proximal), nats
    return parts


def means(parts: Mapping[str, torch.Tensor]) -> dict[str, Mean]:
    """Means over tokens, with one transfer from the device for all."""
    if not parts:
        return {}
    tokens = len(next(iter(parts.values())))
    with torch.no_grad():
        totals = torch.stack([x_N.sum(dtype=torch.float64) for x_N in parts.values()]).tolist()
    sums = dict(zip(parts, totals, strict=True))
    moved = sums.pop("moved", 0.0)
    return {name: Mean(total, moved if name == "clipped" else float(tokens)) for name, total in sums.items()}
