"""Counter-based sampling: the noise of a token depends on its sequence's seed and its position, on nothing else.

So the same seeds and weights give the same tokens in any batch, on any worker, and after a preemption, and the
noise of a whole batch costs one vector operation.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea & Flood 2014): a bijection of 64-bit words whose outputs look random."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def streams(seeds: Sequence[int] | NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One well-mixed 64-bit stream number per seed, [R]; neighbouring seeds give unrelated streams."""
    return mix(np.asarray(seeds, np.uint64) + _GOLDEN)


def noise(stream_R: NDArray[np.uint64], position_R: NDArray[np.int64]) -> NDArray[np.uint64]:
    """64 random bits per row, for the token at `position_R` of the sequence, [R]."""
    return mix(stream_R + position_R.astype(np.uint64) * _GOLDEN)


def uniform(stream_R: NDArray[np.uint64], position_R: NDArray[np.int64]) -> NDArray[np.float64]:
    """Uniform in [0, 1) with 52 bits per row, [R].

    >>> u = uniform(streams([7, 7, 8]), np.array([3, 4, 3]))
    >>> len(set(u.tolist())), bool(((u >= 0) & (u < 1)).all())
    (3, True)
    """
    # 52 bits, not 53: u * total then stays below total for every total.
    return (noise(stream_R, position_R) >> np.uint64(12)).astype(np.float64) * 2.0**-52


def log_softmax(logits_RV: NDArray[np.floating]) -> NDArray[np.float64]:
    """Log-probabilities in double precision, nats, [R, V]."""
    shifted = logits_RV.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def sample(
    logits_RV: NDArray[np.floating], uniform_R: NDArray[np.float64], temperature: float
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """One token per row by inversion of the cumulative distribution, and its log-probability.

    At temperature 0 the most likely token, with its log-probability at temperature 1.

    Args:
        logits_RV: [R, V].
        uniform_R: in [0, 1), [R].
        temperature: divides the logits.

    >>> sample(np.log([[0.2, 0.3, 0.5]]), np.array([0.4]), 1.0)[0]
    array([1])
    """
    if temperature == 0.0:
        logprob_RV = log_softmax(logits_RV)
        tokens_R = logits_RV.argmax(axis=-1)
    else:
        logprob_RV = log_softmax(logits_RV / temperature)
        cumulative_RV = np.exp(logprob_RV).cumsum(axis=-1)
        tokens_R = (cumulative_RV <= (uniform_R * cumulative_RV[:, -1])[:, None]).sum(axis=-1)
    return tokens_R, logprob_RV[np.arange(len(tokens_R)), tokens_R]
