"""learner/sequences.py: sums, means and spreads over ragged runs of tokens, in numpy and torch alike."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from millrace.learner.sequences import Sequences

LENGTHS = st.lists(st.integers(0, 6), max_size=8)


@given(LENGTHS, st.integers(0, 2**31))
def test_both_libraries_agree_with_a_loop(lengths: list[int], seed: int) -> None:
    x_N = np.random.default_rng(seed).normal(size=sum(lengths)).astype(np.float32)
    sequences = Sequences(lengths)
    parts = np.split(x_N, np.cumsum(lengths)[:-1]) if lengths else []
    sums = np.array([part.sum(dtype=np.float64) for part in parts])
    means = np.array([part.mean(dtype=np.float64) if len(part) else 0.0 for part in parts])
    for array, back in ((x_N, np.asarray), (torch.from_numpy(x_N), lambda x: x.numpy())):
        np.testing.assert_allclose(back(sequences.sum(array)), sums, atol=1e-5)
        np.testing.assert_allclose(back(sequences.mean(array)), means, atol=1e-5)
        spread = back(sequences.spread(sequences.mean(array)))
        np.testing.assert_allclose(spread, np.repeat(means, lengths), atol=1e-5)
        assert spread.dtype == np.float32 and len(spread) == sequences.total == sum(lengths)
    assert len(sequences) == len(lengths)


@given(LENGTHS, st.integers(0, 8), st.integers(0, 8))
def test_a_run_of_sequences_is_sequences(lengths: list[int], start: int, stop: int) -> None:
    sequences, part = Sequences(lengths), slice(start, stop)
    x_N = np.arange(sequences.total)
    expected = np.flatnonzero(np.isin(np.repeat(np.arange(len(lengths)), lengths), np.arange(len(lengths))[part]))
    np.testing.assert_array_equal(x_N[sequences.tokens(part)], expected)
    np.testing.assert_array_equal(sequences[part].lengths_S, np.array(lengths, np.int64)[part])


def test_gradients_stay_within_their_sequence() -> None:
    x_N = torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True)
    sequences = Sequences(torch.tensor([3, 0, 1]))
    sequences.mean(x_N)[0].backward()
    torch.testing.assert_close(x_N.grad, torch.tensor([1 / 3, 1 / 3, 1 / 3, 0.0]))
    x_S = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    sequences.spread(x_S).backward(torch.tensor([1.0, 10.0, 100.0, 1000.0]))
    torch.testing.assert_close(x_S.grad, torch.tensor([111.0, 0.0, 1000.0]))


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one count of tokens per sequence, got array\(\[-1\]\)"):
        Sequences([-1])
    with pytest.raises(ValueError, match=r"expected shape \[N\] = \[3\], got \[4\]"):
        Sequences([2, 1]).sum(np.zeros(4, np.float32))
    with pytest.raises(ValueError, match=r"expected shape \[S\] = \[2\], got \[3\]"):
        Sequences([2, 1]).spread(torch.zeros(3))
    with pytest.raises(ValueError, match="cut in runs, got step 2"):
        Sequences([2, 1]).tokens(slice(0, 2, 2))
