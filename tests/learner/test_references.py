"""learner/references/: how far the reference has moved, step by step."""

import numpy as np
import pytest

from millrace.core import catalogue
from millrace.core.errors import RecipeError
from millrace.learner.objective import Objective
from millrace.learner.references import ema, frozen, snapshot


def follow(shares: list[float], policy: list[float], start: float = 0.0) -> list[float]:
    """One weight of the reference after each step: reference += share * (policy - reference)."""
    reference, path = start, []
    for share, weight in zip(shares, policy, strict=True):
        reference += share * (weight - reference)
        path.append(reference)
    return path


def test_frozen_never_moves() -> None:
    assert [frozen(step) for step in range(1, 5)] == [0.0] * 4


def test_ema_is_the_exponential_moving_average_of_the_policy() -> None:
    policy = [1.0, 2.0, 4.0]
    shares = [ema(step, decay=0.75) for step in (1, 2, 3)]
    # 0.25; 0.75 * 0.25 + 0.25 * 2 = 0.6875; 0.75 * 0.6875 + 0.25 * 4 = 1.515625
    np.testing.assert_allclose(follow(shares, policy), [0.25, 0.6875, 1.515625])
    assert [ema(step, decay=0.75, every=3) for step in range(1, 8)] == [0, 0, 0.25, 0, 0, 0.25, 0]
    assert ema(1, decay=1.0) == 0.0 and ema(1, decay=0.0) == 1.0


def test_snapshot_is_the_policy_of_the_last_multiple() -> None:
    shares = [snapshot(step, every=2) for step in range(1, 6)]
    assert shares == [0, 1, 0, 1, 0]
    assert follow(shares, [1.0, 2.0, 3.0, 4.0, 5.0]) == [0, 2, 2, 4, 4]


@pytest.mark.parametrize("name", catalogue.names("millrace.learner.references"))
def test_every_share_lies_between_staying_and_becoming_the_policy(name: str) -> None:
    objective = Objective.of({"reference": name})
    assert all(0 <= objective.reference_share(step) <= 1 for step in range(1, 300))
    assert objective.moves_reference == (name != "frozen")


@pytest.mark.parametrize(("name", "setting", "value"), [("ema", "decay", 1.5), ("snapshot", "every", 0)])
def test_settings_without_a_meaning_are_refused(name: str, setting: str, value: float) -> None:
    with pytest.raises(RecipeError, match=f"references.{name}: {setting} = "):
        Objective.of({"reference": {"name": name, setting: value}})
