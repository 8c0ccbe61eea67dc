"""Probability ratios per token and per sequence, to the policy as the step began or to the one that sampled."""

import torch

from millrace.learner.sequences import Sequences

LARGEST_LOG_PRODUCT = 30.0  # nats


def token(logprob_N: torch.Tensor, proximal_logprob_N: torch.Tensor) -> torch.Tensor:
    """Ratio of each token to the policy as the step began; 1 at a batch's first optimiser step.

        ratio_t = pi(t) / pi_proximal(t) = exp(logprob_t - proximal_t)

    Source: Proximal Policy Optimization (Schulman et al. 2017), arXiv:1707.06347, section 3; beside a correction
    it is the decoupled form of Batch size-invariance (Hilton et al. 2021), arXiv:2110.00641.

    Args:
        logprob_N: nats, under the policy; carries the gradient.
        proximal_logprob_N: nats, under the policy as the step began.
    Returns:
        ratio_N, > 0; d ratio_t / d logprob_t = ratio_t.

    >>> token(torch.log(torch.tensor([0.5, 0.2])), torch.log(torch.tensor([0.25, 0.2])))
    tensor([2., 1.])
    """
    return torch.exp(logprob_N - proximal_logprob_N)


def behaviour(logprob_N: torch.Tensor, behaviour_logprob_N: torch.Tensor) -> torch.Tensor:
    """Ratio of each token to the weights that sampled it, however old they are.

        ratio_t = pi(t) / mu(t) = exp(logprob_t - behaviour_t)

    Source: Proximal Policy Optimization (Schulman et al. 2017), arXiv:1707.06347, section 3: its pi_old is the
    policy that sampled.

    Args:
        logprob_N: nats, under the policy; carries the gradient.
        behaviour_logprob_N: nats, of the distribution that sampled.
    Returns:
        ratio_N, > 0; d ratio_t / d logprob_t = ratio_t.

    >>> behaviour(torch.log(torch.tensor([0.5, 0.2])), torch.log(torch.tensor([0.25, 0.4])))
    tensor([2.0000, 0.5000])
    """
    return torch.exp(logprob_N - behaviour_logprob_N)


def sequence(logprob_N: torch.Tensor, proximal_logprob_N: torch.Tensor, sequences: Sequences) -> torch.Tensor:
    """Geometric mean of a sequence's token ratios to the policy as the step began, on each of its tokens.

        s = exp(mean_t(logprob_t - proximal_t))         ratio_t = sg[s] * pi(t) / sg[pi(t)]

    The stop-gradient form has the value s on every token and lets each carry its own gradient; with one advantage
    per sequence and sequence_mean it is the gradient of s itself.

    Source: Group Sequence Policy Optimization (Zheng et al. 2025), arXiv:2507.18071, GSPO and GSPO-token.

    Args:
        logprob_N: nats, under the policy; carries the gradient.
        proximal_logprob_N: nats, under the policy as the step began.
        sequences: which tokens belong together.
    Returns:
        ratio_N, > 0, equal within a sequence; d ratio_t / d logprob_t = s.

    >>> logprob_N, old_N = torch.log(torch.tensor([0.4, 0.2, 0.3])), torch.log(torch.tensor([0.1, 0.2, 0.3]))
    >>> sequence(logprob_N, old_N, Sequences([2, 1]))
    tensor([2., 2., 1.])
    """
    return _sequence(logprob_N, proximal_logprob_N, sequences)


def behaviour_sequence(
    logprob_N: torch.Tensor, behaviour_logprob_N: torch.Tensor, sequences: Sequences
) -> torch.Tensor:
    """Geometric mean of a sequence's token ratios to the weights that sampled it, on each of its tokens.

        s = exp(mean_t(logprob_t - behaviour_t))        ratio_t = sg[s] * pi(t) / sg[pi(t)]

    Source: Group Sequence Policy Optimization (Zheng et al. 2025), arXiv:2507.18071, with the policy that
    sampled as its old one.

    Args:
        logprob_N: nats, under the policy; carries the gradient.
        behaviour_logprob_N: nats, of the distribution that sampled.
        sequences: which tokens belong together.
    Returns:
        ratio_N, > 0, equal within a sequence; d ratio_t / d logprob_t = s.

    >>> logprob_N, old_N = torch.log(torch.tensor([0.4, 0.2, 0.3])), torch.log(torch.tensor([0.1, 0.2, 0.6]))
    >>> behaviour_sequence(logprob_N, old_N, Sequences([2, 1]))
    tensor([2.0000, 2.0000, 0.5000])
    """
    return _sequence(logprob_N, behaviour_logprob_N, sequences)


def sequence_product(logprob_N: torch.Tensor, proximal_logprob_N: torch.Tensor, sequences: Sequences) -> torch.Tensor:
    """The whole sequence's probability ratio to the policy as the step began, on each of its tokens.

        ratio_t = prod_s pi(s) / pi_proximal(s) = exp(min(sum_s(logprob_s - proximal_s), 30))

    The bound keeps the product of a long sequence, and its gradient, finite. Every token of the sequence carries the
    gradient of every other; with one advantage per sequence and sequence_mean the loss is that of the sequence as a
    single action.

    Source: Back to Basics (Ahmadian et al. 2024), arXiv:2402.14740, section 3: the whole generation as one action.

    Args:
        logprob_N: nats, under the policy; carries the gradient.
        proximal_logprob_N: nats, under the policy as the step began.
        sequences: which tokens belong together.
    Returns:
        ratio_N, > 0, equal within a sequence; d ratio_t / d logprob_s = ratio_t for all t, s of a sequence.

    >>> logprob_N, old_N = torch.log(torch.tensor([0.4, 0.2, 0.3])), torch.log(torch.tensor([0.1, 0.1, 0.3]))
    >>> sequence_product(logprob_N, old_N, Sequences([2, 1]))
    tensor([8., 8., 1.])
    """
    return sequences.spread(torch.exp(sequences.sum(logprob_N - proximal_logprob_N).clamp(max=LARGEST_LOG_PRODUCT)))


def _sequence(logprob_N: torch.Tensor, old_logprob_N: torch.Tensor, sequences: Sequences) -> torch.Tensor:
    log_s_N = sequences.spread(sequences.mean((logprob_N - old_logprob_N).detach()))
    return torch.exp(log_s_N + logprob_N - logprob_N.detach())
