"""Closed forms of the length shapers."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.core.errors import DataError, RecipeError
from millrace.rewards.shapers import (
    cosine,
    efficient,
    kimi_length,
    lead,
    length_budget,
    length_cost,
    length_target,
    overlong,
    truncation_penalty,
    truncation_value,
)

ONES = np.ones(5, np.float32)


def test_overlong_is_dapo_s_equation_with_its_numbers() -> None:
    length_G = np.array([1, 16384, 16384 + 1024, 20480, 30000])
    for settings in ({"limit": 20480}, {}):
        shaped_G = overlong(ONES, length_G, 20480, **settings)
        assert shaped_G.tolist() == pytest.approx([1, 1, 1 - 0.25, 0, 0])
    assert overlong(ONES, length_G, 99, limit=20480, penalty=2.0)[3] == -1.0
    assert overlong(ONES, length_G, 20480, buffer_share=1.0)[1] == pytest.approx(1 - 16384 / 20480)


def test_truncation() -> None:
    truncated_G = np.array([True, False, True, False, False])
    assert truncation_penalty(ONES, truncated_G, penalty=0.25).tolist() == [0.75, 1, 0.75, 1, 1]
    assert truncation_value(ONES, truncated_G, value=-1.0).tolist() == [-1, 1, -1, 1, 1]


def test_length_cost_is_linear() -> None:
    assert length_cost(ONES, np.arange(5) * 25, 100, coefficient=0.4).tolist() == pytest.approx([1, 0.9, 0.8, 0.7, 0.6])


def test_cosine_has_its_ends_and_its_middle() -> None:
    values: dict[str, Any] = {
        "correct_short": 2.0, "correct_long": 1.0, "wrong_short": -10.0, "wrong_long": 0.0, "exceeded": -7.0,
    }  # fmt: skip
    length_G = np.array([0, 500, 999, 1000, 1001])
    expected = 1 + (1 + math.cos(math.pi * 0.999)) / 2
    assert cosine(ONES, length_G, 1000, **values).tolist() == pytest.approx([2, 1.5, expected, -7, -7])
    wrong = cosine(0 * ONES, length_G, 1000, **values).tolist()
    assert wrong[:2] == [-10, -5] and wrong[2] == pytest.approx(0, abs=1e-4) and wrong[3:] == [-7, -7]


def test_kimi_length_is_the_paper_s() -> None:
    reward_G, length_G = np.array([1, 1, 1, 0, 0], np.float32), np.array([100, 200, 300, 100, 300])
    assert kimi_length(reward_G, length_G).tolist() == [1.5, 1, 0.5, 0, -0.5]
    assert kimi_length(reward_G, length_G, weight=0.2).tolist() == pytest.approx([1.1, 1, 0.9, 0, -0.1])
    assert kimi_length(reward_G, np.full(5, 7)).tolist() == reward_G.tolist()


def test_efficient_compares_correct_responses_only() -> None:
    reward_G, length_G = np.array([1, 1, 0, 0.2, 1], np.float32), np.array([100, 300, 9999, 1, 200])
    deviation = np.std([100, 300, 200])
    expected = [1 - 0.4 / (1 + math.exp(-z / deviation)) for z in (-100, 100, 0)]
    shaped_G = efficient(reward_G, length_G, alpha=0.4)
    assert shaped_G[[0, 1, 4]].tolist() == pytest.approx(expected, rel=1e-5)
    assert shaped_G[[2, 3]].tolist() == pytest.approx([0, 0.2])
    assert efficient(0 * ONES, length_G).tolist() == [0] * 5  # none is correct: nothing to compare with


def test_lead_is_exponential_in_the_standardised_length() -> None:
    reward_G, length_G = np.array([1, 1, 0, 0, 1], np.float32), np.array([100, 300, 9999, 1, 200])
    deviation = np.std([100, 300, 200])
    shaped_G = lead(reward_G, length_G, alpha=0.5)
    assert shaped_G[[0, 1, 4]].tolist() == pytest.approx([math.exp(50 / deviation), math.exp(-50 / deviation), 1])
    assert shaped_G[[2, 3]].tolist() == [-1, -1]


def test_l1_exact_and_max() -> None:
    length_G = np.array([0, 900, 1000, 1100, 9000])
    exact = length_target(ONES, length_G, {"tokens": 1000}, alpha=0.001)
    assert exact.tolist() == pytest.approx([0, 0.9, 1, 0.9, -7])
    most = length_budget(ONES, length_G, {"n": 1000}, column="n", alpha=0.001, delta=0.5)
    assert most.tolist() == pytest.approx([1, 0.6, 0.5, 0.4, 0])
    assert length_budget(0 * ONES, length_G, {"tokens": 1000}).tolist() == [0] * 5
    with pytest.raises(RecipeError, match="negative"):
        length_budget(-ONES, length_G, {"tokens": 1000})


@pytest.mark.parametrize("row", [{}, {"tokens": "many"}, {"tokens": -1}, {"tokens": float("nan")}, {"tokens": True}])
def test_a_row_without_the_length_asked_for_is_named(row: dict[str, Any]) -> None:
    for shaper in (length_target, length_budget):
        with pytest.raises(DataError, match="column 'tokens'"):
            shaper(ONES, np.arange(5), row)


groups = st.lists(st.tuples(st.sampled_from([0.0, 0.25, 1.0]), st.integers(0, 64)), min_size=1, max_size=8)


@given(groups)
def test_no_length_shaper_prefers_the_longer_of_two_correct_responses(group: list[tuple[float, int]]) -> None:
    reward_G, length_G = np.array([r for r, _ in group], np.float32), np.array([length for _, length in group])
    shaped = [
        overlong(reward_G, length_G, 64),
        length_cost(reward_G, length_G, 64),
        cosine(reward_G, length_G, 64),
        kimi_length(reward_G, length_G),
        efficient(reward_G, length_G),
        lead(reward_G, length_G),
        length_budget(reward_G, length_G, {"tokens": 32}),
    ]
    for shaped_G in shaped:
        assert shaped_G.dtype == np.float32 and shaped_G.shape == reward_G.shape and np.isfinite(shaped_G).all()
        correct = np.flatnonzero(reward_G == 1.0)
        order = correct[np.argsort(length_G[correct], kind="stable")]
        assert (np.diff(shaped_G[order]) <= 1e-6).all()
