"""Estimators of KL(policy || reference) from tokens that the policy sampled, used as losses.

Which is the better estimate of the VALUE and which has the right GRADIENT are different questions: see each.
"""

import torch
from pydantic import NonNegativeFloat


def k1(
    logprob_N: torch.Tensor, reference_logprob_N: torch.Tensor, *, coefficient: NonNegativeFloat = 0.01
) -> torch.Tensor:
    """The log-ratio to the reference: an unbiased value, but as a loss its expected gradient is 0 on-policy.

        loss_t = coefficient * (logprob_t - reference_t)        d loss_t / d logprob_t = coefficient

    Source: Rethinking KL Regularization in RLHF (Liu et al. 2025), arXiv:2510.01555; the estimator:
    Approximating KL Divergence (Schulman 2020).

    Args:
        logprob_N: nats, under the policy; carries the gradient.
        reference_logprob_N: nats, under the reference model.
        coefficient: reward units per nat.
    Returns:
        loss_N, of either sign.

    >>> k1(torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0]), coefficient=1.0)
    tensor([ 0.5000, -1.0000])
    """
    return coefficient * (logprob_N - reference_logprob_N)


def k2(
    logprob_N: torch.Tensor, reference_logprob_N: torch.Tensor, *, coefficient: NonNegativeFloat = 0.01
) -> torch.Tensor:
    """Half the squared log-ratio: on-policy its gradient is that of the reverse KL.

        loss_t = coefficient / 2 * (logprob_t - reference_t)^2
        d loss_t / d logprob_t = coefficient * (logprob_t - reference_t)

    Source: Rethinking KL Regularization in RLHF (Liu et al. 2025), arXiv:2510.01555; the estimator:
    Approximating KL Divergence (Schulman 2020).

    Args:
        logprob_N: nats, under the policy; carries the gradient.
        reference_logprob_N: nats, under the reference model.
        coefficient: reward units per nat.
    Returns:
        loss_N >= 0.

    >>> k2(torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0]), coefficient=1.0)
    tensor([0.1250, 0.5000])
    """
    return 0.5 * coefficient * (logprob_N - reference_logprob_N).square()


def k3(
    logprob_N: torch.Tensor, reference_logprob_N: torch.Tensor, *, coefficient: NonNegativeFloat = 0.01
) -> torch.Tensor:
    """The unbiased, never negative estimator of GRPO: on-policy its gradient is that of the FORWARD KL.

        q_t = pi_reference(t) / pi(t)           loss_t = coefficient * (q_t - log q_t - 1)
        d loss_t / d logprob_t = coefficient * (1 - q_t)

    Source: DeepSeekMath (Shao et al. 2024), arXiv:2402.03300, equation 4; its gradient: arXiv:2510.01555.

    Args:
        logprob_N: nats, under the policy; carries the gradient.
        reference_logprob_N: nats, under the reference model.
        coefficient: reward units per nat.
    Returns:
        loss_N >= 0.

    >>> k3(torch.log(torch.tensor([0.2, 0.5])), torch.log(torch.tensor([0.4, 0.5])), coefficient=1.0)
    tensor([0.3069, 0.0000])
    """
    log_q_N = reference_logprob_N - logprob_N
    return coefficient * (torch.expm1(log_q_N) - log_q_N)


def k3_unbiased(
    logprob_N: torch.Tensor,
    reference_logprob_N: torch.Tensor,
    behaviour_logprob_N: torch.Tensor,
    *,
    coefficient: NonNegativeFloat = 0.01,
) -> torch.Tensor:
    """k3 under the importance weight of the policy: value and gradient of the reverse KL, whoever sampled.

        w_t = pi(t) / mu(t)     q_t = pi_reference(t) / pi(t)       loss_t = coefficient * w_t * (q_t - log q_t - 1)
        d loss_t / d logprob_t = coefficient * w_t * (logprob_t - reference_t)

    The gradient runs through the weight too. It is bounded where k3's grows without bound: on tokens that have
    become far less likely than under the reference.

    Source: DeepSeek-V3.2 (DeepSeek-AI 2025), arXiv:2512.02556, section 3.1, unbiased KL estimate.

    Args:
        logprob_N: nats, under the policy; carries the gradient.
        reference_logprob_N: nats, under the reference model.
        behaviour_logprob_N: nats, of the distribution that sampled.
        coefficient: reward units per nat.
    Returns:
        loss_N >= 0.

    >>> old_N = torch.log(torch.tensor([0.1, 0.5]))
    >>> k3_unbiased(torch.log(torch.tensor([0.2, 0.5])), torch.log(torch.tensor([0.4, 0.5])), old_N, coefficient=1.0)
    tensor([0.6137, 0.0000])
    """
    weight_N = torch.exp(logprob_N - behaviour_logprob_N)
    return weight_N * k3(logprob_N, reference_logprob_N, coefficient=coefficient)
