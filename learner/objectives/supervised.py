"""Losses on given answers."""

import torch


def nll(logprob_N: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood: maximum likelihood of the tokens as they stand.

        loss_t = -logprob_t

    Source: Training language models to follow instructions (Ouyang et al. 2022), arXiv:2203.02155, section 3.5: SFT.

    Args:
        logprob_N: nats, under the policy; carries the gradient.
    Returns:
        loss_N, nats; d loss_t / d logprob_t = -1.

    >>> nll(torch.tensor([-0.5, -2.0]))
    tensor([0.5000, 2.0000])
    """
    return -logprob_N
