"""What weighs the same: a token, a sequence, or a prompt."""

import numpy as np
from pydantic import PositiveInt

from millrace.core.types import Floats, Ints
from millrace.learner.sequences import Sequences


def token_mean(sequences: Sequences) -> Floats:
    """Every token of the batch weighs the same.

        loss = sum_N(loss) / N

    Source: DAPO (Yu et al. 2025), arXiv:2503.14476, its token-level loss, over the whole batch.

    Args:
        sequences: of the whole batch.
    Returns:
        weight_N, sum 1.

    >>> token_mean(Sequences([1, 3]))
    array([0.25, 0.25, 0.25, 0.25], dtype=float32)
    """
    return np.full(sequences.total, 1 / max(sequences.total, 1), np.float32)


def sequence_mean(sequences: Sequences) -> Floats:
    """Every sequence weighs the same, and every token within it.

        loss = mean_S(mean_t(loss))

    Source: DeepSeekMath (Shao et al. 2024), arXiv:2402.03300, equation 3.

    Args:
        sequences: of the whole batch.
    Returns:
        weight_N, sum 1.

    >>> sequence_mean(Sequences([1, 4]))
    array([0.5  , 0.125, 0.125, 0.125, 0.125], dtype=float32)
    """
    return _spread(sequences, 1 / (_count(sequences) * np.maximum(sequences.lengths_S, 1)))


def sequence_sum(sequences: Sequences) -> Floats:
    """The mean over sequences of the SUM of their tokens: the gradient of the sequence's log-probability.

        loss = mean_S(sum_t(loss))

    Source: Back to Basics (Ahmadian et al. 2024), arXiv:2402.14740.

    Args:
        sequences: of the whole batch.
    Returns:
        weight_N, sum N / S.

    >>> sequence_sum(Sequences([1, 3]))
    array([0.5, 0.5, 0.5, 0.5], dtype=float32)
    """
    return np.full(sequences.total, 1 / _count(sequences), np.float32)


def constant_length(sequences: Sequences, *, length: PositiveInt) -> Floats:
    """The sum of a sequence's tokens over a constant, so that a long answer is not diluted.

        loss = mean_S(sum_t(loss) / length)

    Source: Understanding R1-Zero-Like Training (Liu et al. 2025), arXiv:2503.20783, Dr. GRPO.

    Args:
        sequences: of the whole batch.
        length: tokens; the generation budget.
    Returns:
        weight_N, sum N / (S * length).

    >>> constant_length(Sequences([1, 3]), length=5)
    array([0.1, 0.1, 0.1, 0.1], dtype=float32)
    """
    return np.full(sequences.total, 1 / (_count(sequences) * length), np.float32)


def prompt_mean(sequences: Sequences, group_S: Ints) -> Floats:
    """Every prompt weighs the same, and every token among its rollouts.

        loss = mean over groups(sum of the group's tokens / their number)

    Source: The Art of Scaling Reinforcement Learning Compute (Khatri et al. 2025), arXiv:2510.13786, prompt average.

    Args:
        sequences: of the whole batch.
        group_S: index of each sequence's group.
    Returns:
        weight_N, sum 1.

    >>> prompt_mean(Sequences([1, 1, 4]), np.array([0, 0, 1]))
    array([0.25 , 0.25 , 0.125, 0.125, 0.125, 0.125], dtype=float32)
    """
    _, index_S = np.unique(group_S, return_inverse=True)
    tokens = np.bincount(index_S, weights=sequences.lengths_S)
    groups = max(np.count_nonzero(tokens), 1)
    return _spread(sequences, 1 / (groups * np.maximum(tokens, 1)[index_S]))


def token_sum(sequences: Sequences) -> Floats:
    """The plain sum over all tokens: the gradient grows with the batch.

        loss = sum_N(loss)

    Source: Simple statistical gradient-following algorithms (Williams 1992), doi:10.1007/BF00992696, without averaging.

    Args:
        sequences: of the whole batch.
    Returns:
        weight_N, sum N.

    >>> token_sum(Sequences([1, 3]))
    array([1., 1., 1., 1.], dtype=float32)
    """
    return np.ones(sequences.total, np.float32)


def _count(sequences: Sequences) -> int:
    return max(int(np.count_nonzero(sequences.lengths_S)), 1)


def _spread(sequences: Sequences, weight_S: np.ndarray) -> Floats:
    return sequences.spread(weight_S.astype(np.float32))
