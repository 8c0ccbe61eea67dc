"""Which groups each filter keeps."""

from typing import Any

import numpy as np
import pytest

from millrace.core.catalogue import memory, resolve, restore
from millrace.core.errors import RewardError
from millrace.core.words import SLOTS
from millrace.rewards.filters import (
    failures,
    mastered,
    mean_window,
    min_unique,
    no_signal,
    solve_rate_window,
    truncation,
    variance_share,
    zero_variance,
)

SOLVED, MIXED = np.ones(2, np.float32), np.array([1, 0], np.float32)


def rewards(*values: float) -> Any:
    return np.array(values, np.float32)


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (lambda: zero_variance(rewards(0.1, 0.1, 0.1)), False),
        (lambda: zero_variance(rewards(0.1, 0.1, 0.2)), True),
        (lambda: zero_variance(rewards(0.1, 0.2), tolerance=0.2), False),
        (lambda: zero_variance(rewards(1)), False),
        (lambda: no_signal(rewards(0.1, 0.1)), False),
        (lambda: no_signal(rewards(0.1, 0.2)), True),
        (lambda: solve_rate_window(rewards(1, 0, 0, 0, 0)), True),  # 0.2, the bound itself
        (lambda: solve_rate_window(rewards(1, 0, 0, 0, 0), low=0.25), False),
        (lambda: solve_rate_window(rewards(1, 1, 1, 1, 0)), True),
        (lambda: solve_rate_window(rewards(1, 1, 1, 1, 1)), False),
        (lambda: solve_rate_window(rewards(0.4, 0.2), threshold=0.3), True),
        (lambda: mean_window(rewards(0, 0.25)), True),
        (lambda: mean_window(rewards(0, 0.1)), False),
        (lambda: mean_window(rewards(-5, -3), low=-4.0, high=0.0), True),
        (lambda: variance_share(rewards(0, 1, 0, 1), at_least=1.0), True),
        (lambda: variance_share(rewards(0, 0, 0, 1), at_least=0.75), True),  # 4 p (1 - p) = 0.75
        (lambda: variance_share(rewards(0, 0, 0, 1), at_least=0.76), False),
        (lambda: variance_share(rewards(-1, 1), at_least=1.0, lowest=-1.0), True),
        (lambda: truncation(np.array([True, False])), True),
        (lambda: truncation(np.array([True, True, False])), False),
        (lambda: truncation(np.array([True, True]), at_most=1.0), True),
        (lambda: failures(np.array([True, False, False]), at_most=0.25), False),
        (lambda: failures(np.array([False, False]), at_most=0.0), True),
        (lambda: min_unique(["a", "a ", "b"]), True),
        (lambda: min_unique(["a", "a\n"]), False),
        (lambda: min_unique(["a", "b"], at_least=3), True),  # both differ: a group of two cannot do better
        (lambda: min_unique(["a", "b", "b"], at_least=3), False),
    ],
)
def test_keeps(keep: Any, expected: bool) -> None:
    kept = keep()
    assert kept is expected


def test_mastered_rejects_after_so_many_solved_groups_and_forgives_at_the_first_failure() -> None:
    keep = mastered(groups=2)
    seen = [
        keep(r, p) for p, r in [("a", SOLVED), ("b", SOLVED), ("a", SOLVED), ("b", MIXED), ("a", MIXED), ("a", SOLVED)]
    ]
    assert seen == [True, True, False, True, True, True]


def test_mastered_remembers_a_bounded_number_of_prompts_the_ones_seen_last() -> None:
    keep = mastered(groups=2, most=2)
    for prompt in ("a", "b", "a", "c"):  # b was seen longest ago
        keep(SOLVED, prompt)
    assert len(keep.streaks) == 2
    assert keep(SOLVED, "a") is False
    assert keep(SOLVED, "b") is True


def test_mastered_s_memory_is_restored() -> None:
    def method() -> Any:
        spec = {"name": "mastered", "groups": 2}
        return resolve(spec, folder="millrace.rewards.filters", words=SLOTS["filter"], slot="filter", error=RewardError)

    first, second = method(), method()
    assert first.call({"reward_G": SOLVED, "prompt": "\ud800"}) is True  # half a surrogate pair is a prompt too
    restore(second, memory(first))
    assert second.call({"reward_G": SOLVED, "prompt": "\ud800"}) is False
