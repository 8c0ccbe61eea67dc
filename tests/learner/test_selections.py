"""learner/selections/: who is kept, by hand and against a search over all subsets."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.core import catalogue
from millrace.core.types import Floats
from millrace.learner.objective import Objective
from millrace.learner.selections import best, best_and_worst, max_variance, positive

NAMES = catalogue.names("millrace.learner.selections")
GROUPS = st.lists(st.floats(-10, 10, width=16), min_size=1, max_size=8).map(lambda r: np.array(r, np.float32))


def array(*rewards: float) -> Floats:
    return np.array(rewards, np.float32)


def test_best() -> None:
    assert best(array(0, 0.5, 1, 1)).tolist() == [False, False, True, False]
    assert best(array(0, 0)).tolist() == [True, False]  # also where none succeeded: the reward is not looked at
    assert best(array(-1)).tolist() == [True]


def test_best_and_worst() -> None:
    assert best_and_worst(array(0.5, 0, 1, 0, 1)).tolist() == [False, True, True, False, False]
    assert best_and_worst(array(1, 1, 1)).tolist() == [False] * 3
    assert best_and_worst(array(1)).tolist() == [False]


def test_positive() -> None:
    assert positive(array(0, 0.5, 1)).tolist() == [False, True, True]
    assert positive(array(0, 0.5, 1), threshold=0.5).tolist() == [False, False, True]
    assert positive(array(0, 0)).tolist() == [False, False]


def test_max_variance() -> None:
    # of 0 1 2 9: with two, the extremes; with three, var(0 1 9) = 16.22 beats var(0 2 9) and var(1 2 9)
    assert max_variance(array(9, 1, 0, 2), size=2).tolist() == [True, False, True, False]
    assert max_variance(array(9, 1, 0, 2), size=3).tolist() == [True, True, True, False]
    assert max_variance(array(1, 0), size=5).tolist() == [True, True]
    # binary rewards: as many of either kind as there are, up to half
    assert max_variance(array(1, 0, 0, 0, 0, 1, 0, 1), size=4).tolist().count(True) == 4
    assert array(1, 0, 0, 0, 0, 1, 0, 1)[max_variance(array(1, 0, 0, 0, 0, 1, 0, 1), size=4)].sum() == 2


@given(reward_G=GROUPS, size=st.integers(1, 8))
def test_no_subset_varies_more(reward_G: Floats, size: int) -> None:
    keep_G = max_variance(reward_G, size=size)
    size = min(size, len(reward_G))
    assert int(keep_G.sum()) == size
    most = max(reward_G[list(at)].astype(np.float64).var() for at in combinations(range(len(reward_G)), size))
    assert reward_G[keep_G].astype(np.float64).var() == pytest.approx(most, abs=1e-9)


@pytest.mark.parametrize("name", NAMES)
@given(reward_G=GROUPS)
def test_what_is_kept_is_one_truth_value_per_rollout(name: str, reward_G: Floats) -> None:
    spec = {"name": name, "size": 3} if name == "max_variance" else name
    keep_G = Objective.of({"selection": spec}).keep({"reward_G": reward_G})
    assert keep_G.shape == reward_G.shape and keep_G.dtype == np.bool_
    if keep_G.any() and name in ("best", "best_and_worst", "max_variance"):
        assert reward_G[keep_G].max() == reward_G.max()
    if name == "best_and_worst":
        assert keep_G.sum() == (0 if reward_G.min() == reward_G.max() else 2)
