"""learner/aggregations/: what weighs the same."""

import numpy as np
import pytest

from millrace.core import catalogue
from millrace.learner.aggregations import (
    constant_length,
    prompt_mean,
    sequence_mean,
    sequence_sum,
    token_mean,
    token_sum,
)
from millrace.learner.objective import Objective
from millrace.learner.sequences import Sequences

NAMES = catalogue.names("millrace.learner.aggregations")
LENGTHS = [2, 0, 3, 5]
GROUPS = np.array([7, 7, 7, 3], np.int32)  # of 5, and of 5 tokens
LOSS = np.arange(1, 11, dtype=np.float32)  # sequences: 1 2 | | 3 4 5 | 6 7 8 9 10
SEQUENCES = Sequences(LENGTHS)


def test_by_hand() -> None:
    # all ten tokens: 55 / 10
    assert float(token_mean(SEQUENCES) @ LOSS) == pytest.approx(5.5)
    # three sequences have tokens, means 1.5, 4 and 8: 13.5 / 3
    assert float(sequence_mean(SEQUENCES) @ LOSS) == pytest.approx(4.5)
    # their sums: 55 / 3
    assert float(sequence_sum(SEQUENCES) @ LOSS) == pytest.approx(55 / 3)
    # the same over 100 tokens each
    assert float(constant_length(SEQUENCES, length=100) @ LOSS) == pytest.approx(55 / 300)
    assert float(token_sum(SEQUENCES) @ LOSS) == pytest.approx(55)
    # groups: (1 + 2 + 3 + 4 + 5) / 5 = 3 and (6 + ... + 10) / 5 = 8: 11 / 2
    assert float(prompt_mean(SEQUENCES, GROUPS) @ LOSS) == pytest.approx(5.5)


def test_prompts_weigh_the_same_whatever_their_length() -> None:
    # groups of 5 and of 1 token: (3 + 6) / 2, where the token mean is 21 / 6
    sequences, group_S = Sequences([2, 3, 1]), np.array([0, 0, 1])
    assert float(prompt_mean(sequences, group_S) @ LOSS[:6]) == pytest.approx(4.5)
    assert float(token_mean(sequences) @ LOSS[:6]) == pytest.approx(3.5)
    # a group whose every token is masked is no group
    assert float(prompt_mean(Sequences([2, 3, 0]), group_S) @ LOSS[:5]) == pytest.approx(3.0)


def test_of_equal_lengths_all_means_are_one() -> None:
    sequences, group_S = Sequences([4, 4, 4, 4]), np.array([0, 0, 1, 1])
    for weight_N in (sequence_mean(sequences), prompt_mean(sequences, group_S), constant_length(sequences, length=4)):
        np.testing.assert_allclose(weight_N, token_mean(sequences), rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 4], [1] * 100])
def test_every_weight_is_positive_and_finite(name: str, lengths: list[int]) -> None:
    spec = {"name": name, "length": 100} if name == "constant_length" else name
    sequences, group_S = Sequences(lengths), np.arange(len(lengths)) // 2
    weight_N = Objective.of({"aggregation": spec}).token_weights(sequences, group_S=group_S)
    assert weight_N.shape == (sum(lengths),) and weight_N.dtype == np.float32
    assert np.isfinite(weight_N).all() and (weight_N > 0).all()
    if name.endswith("mean") and sum(lengths):
        assert float(weight_N.sum()) == pytest.approx(1.0)


@pytest.mark.parametrize("name", NAMES)
def test_a_sequence_without_loss_tokens_changes_nothing(name: str) -> None:
    objective = Objective.of({"aggregation": {"name": name, "length": 100} if name == "constant_length" else name})
    with_empty = objective.token_weights(SEQUENCES, group_S=GROUPS)
    without = objective.token_weights(Sequences([2, 3, 5]), group_S=GROUPS[[0, 2, 3]])
    np.testing.assert_array_equal(with_empty, without)
