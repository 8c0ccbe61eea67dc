"""Shapers that keep the policy near the reference by what it earns, not by a term of the loss."""

from typing import Any, Literal

import numpy as np
from pydantic import NonNegativeFloat

from millrace.core.types import Floats


def kl(
    reward_G: Floats,
    proximal_logprob_N: Floats,
    reference_logprob_N: Floats,
    sequences: Any,
    *,
    coefficient: NonNegativeFloat = 0.05,
    estimator: Literal["k1", "k2", "k3"] = "k1",
) -> Floats:
    """Every response pays for its distance from the reference model, summed over its tokens.

        d_t = proximal_t - reference_t
        r'_i = r_i - coefficient * sum_t k(d_t)     k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d

    Source: Fine-Tuning Language Models from Human Preferences (Ziegler et al. 2019), arXiv:1909.08593, equation 2, with
    k1; the estimators: Approximating KL Divergence (Schulman 2020). In the reward it is k1 whose gradient is that of
    the reverse KL, see arXiv:2510.01555.

    Args:
        reward_G: any unit.
        proximal_logprob_N: nats, under the policy as the step began.
        reference_logprob_N: nats, under the reference model.
        sequences: which tokens belong to which rollout.
        coefficient: reward units per nat.
        estimator: of the divergence, from sampled tokens.
    Returns:
        reward_G, less what the divergence costs.

    >>> from millrace.learner.sequences import Sequences
    >>> policy, reference = np.array([-1, -1, -2], np.float32), np.array([-2, -1, -1], np.float32)
    >>> kl(np.zeros(2, np.float32), policy, reference, Sequences([2, 1]), coefficient=0.5)
    array([-0.5,  0.5], dtype=float32)
    """
    distance_N = np.asarray(proximal_logprob_N, np.float64) - reference_logprob_N
    if estimator == "k1":
        estimate_N = distance_N
    elif estimator == "k2":
        estimate_N = distance_N**2 / 2
    else:
        estimate_N = np.expm1(-distance_N) + distance_N
    return np.asarray(reward_G - coefficient * sequences.sum(estimate_N), np.float32)
