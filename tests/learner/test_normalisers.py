"""learner/normalisers/: the batch's scale, by hand."""

import numpy as np
import pytest

from millrace.core import catalogue
from millrace.core.types import Floats
from millrace.learner.advantages import mean_baseline
from millrace.learner.normalisers import batch_std, batch_whiten
from millrace.learner.objective import Objective
from millrace.learner.sequences import Sequences

NAMES = catalogue.names("millrace.learner.normalisers")


def test_batch_whiten_by_hand() -> None:
    # 4 0 0 0: mean 1; variance (9 + 1 + 1 + 1) / 4 = 3, deviation 1.73205081
    got = batch_whiten(np.array([4, 0, 0, 0], np.float32))
    np.testing.assert_allclose(got, np.array([3, -1, -1, -1]) / 1.73205081, rtol=1e-6)


def test_batch_whiten_counts_tokens_not_sequences() -> None:
    """A sequence of three tokens of advantage -1 beside one token of 1: mean -0.5, deviation sqrt(3) / 2."""
    advantage_N = Sequences([1, 3]).spread(np.array([1, -1], np.float32))
    np.testing.assert_allclose(batch_whiten(advantage_N), np.array([1.5, -0.5, -0.5, -0.5]) / 0.8660254, rtol=1e-6)


def test_batch_std_by_hand() -> None:
    """Groups (1 0) and (5 5), sequences of 2, 0, 1 and 3 tokens; the one without tokens is not counted."""
    sequences, group_S = Sequences([2, 1, 0, 1, 3]), np.array([3, 3, 3, 7, 7])
    advantage_N = sequences.spread(np.array([1, 0, 0, 5, 5], np.float32))
    # rewards 1 0 5 5: mean 2.75, squares 3.0625 + 7.5625 + 2 * 5.0625 = 20.75, over 3 = 6.91666667, root 2.62995564
    expected = np.array([0.5, 0.5, -0.5, 0, 0, 0, 0]) / 2.62995564
    np.testing.assert_allclose(batch_std(advantage_N, sequences, group_S), expected, rtol=1e-5)


def test_batch_std_of_what_is_centred_already_divides_by_less() -> None:
    sequences, group_S = Sequences([1] * 4), np.array([0, 0, 1, 1])
    reward_N = np.array([1, 0, 5, 5], np.float32)
    centred_N = np.concatenate([mean_baseline(reward_N[:2]), mean_baseline(reward_N[2:])])
    # 1/2 -1/2 0 0: squares 1/2, over 3, root 0.40824829
    expected = np.array([0.5, -0.5, 0, 0]) / 0.40824829
    np.testing.assert_allclose(batch_std(centred_N, sequences, group_S), expected, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reward", [0.0, 0.1, 0.9, 1 / 3, 1e4])
def test_a_batch_of_equal_rewards_has_no_signal(name: str, reward: float) -> None:
    lengths = [3, 1, 70, 0, 7, 2]
    advantage_N: Floats = np.full(sum(lengths), reward, np.float32)
    got = Objective.of({"normaliser": name}).normalised(advantage_N, Sequences(lengths), group_S=np.arange(6) // 2)
    assert got.dtype == np.float32 and not got.any()


def test_a_group_of_equal_rewards_keeps_exactly_no_signal_beside_others() -> None:
    """0.9 summed over three tokens and divided by three is not 0.9 in float32."""
    lengths = [3, 1, 70, 5, 7, 2]
    advantage_N = Sequences(lengths).spread(np.array([0.9, 0.9, 0.9, 1, 0, 1], np.float32))
    got = batch_std(advantage_N, Sequences(lengths), np.arange(6) // 3)
    assert not got[:74].any() and got[74:].all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lengths", [[], [1], [0, 0, 4]])
def test_any_batch_has_finite_advantages(name: str, lengths: list[int]) -> None:
    advantage_N: Floats = np.arange(sum(lengths), dtype=np.float32)
    objective = Objective.of({"normaliser": name})
    got = objective.normalised(advantage_N, Sequences(lengths), group_S=np.zeros(len(lengths), np.int64))
    assert got.shape == advantage_N.shape and np.isfinite(got).all()
