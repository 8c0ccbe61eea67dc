"""Closed forms of the shapers that are not about length."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.core.catalogue import memory, resolve, restore
from millrace.core.errors import RecipeError, RewardError
from millrace.core.words import SLOTS
from millrace.learner.sequences import Sequences
from millrace.rewards.shapers import (
    affine,
    clip,
    gate,
    kl,
    matches,
    moving_baseline,
    repetition,
    running_scale,
    weighted,
)

FOLDER = "millrace.rewards.shapers"


def rewards(*values: float) -> Any:
    return np.array(values, np.float32)


def resolved(spec: Any) -> Any:
    return resolve(spec, folder=FOLDER, words=SLOTS["shaper"], slot="shaper", error=RewardError)


def test_matches_searches_or_wants_all_of_it() -> None:
    texts = ["<a>x\ny</a>", " <a></a>\n", "see <a>x</a>", "x"]
    some = matches(rewards(1, 1, 1, 1), texts, pattern="<a>.*</a>", bonus=0.5, penalty=0.25)
    whole = matches(rewards(1, 1, 1, 1), texts, pattern="<a>.*</a>", bonus=0.5, penalty=0.25, full=True)
    assert some.tolist() == [1.5, 1.5, 1.5, 0.75]
    assert whole.tolist() == [1.5, 1.5, 0.75, 0.75]
    with pytest.raises(RecipeError, match="no regular expression: "):
        matches(rewards(1), ["x"], pattern="(")


@pytest.mark.parametrize(
    ("text", "size", "repeated"),
    [
        ("a b c d e", 3, 0.0),
        ("a a a a a", 1, 4 / 5),
        ("a b a b a", 2, 2 / 4),  # ab, ba, ab, ba
        ("A b a B", 2, 1 / 3),
        ("a b", 3, 0.0),
        ("", 3, 0.0),
    ],
)
def test_repetition_is_the_share_of_runs_seen_before(text: str, size: int, repeated: float) -> None:
    assert repetition(rewards(1), [text], size=size, penalty=2.0)[0] == pytest.approx(1 - 2 * repeated)


def test_weighted_sums_components_and_counts_missing_ones_as_nothing() -> None:
    parts = {"format": rewards(1, math.nan, 0.5), "style": rewards(2, 2, 2)}
    failed_G = np.array([False, True, False])
    shaped_G = weighted(rewards(1, 0, 1), parts, failed_G, weights={"format": 0.5, "style": -0.1}, base=2.0)
    assert shaped_G.tolist() == pytest.approx([2 + 0.5 - 0.2, -0.2, 2 + 0.25 - 0.2])


def test_gate_closes_below_its_threshold_and_leaves_failed_ones() -> None:
    parts = {"format": rewards(0.9, 1.0, math.nan, math.nan)}
    failed_G = np.array([False, False, False, True])
    assert gate(rewards(1, 1, 1, -1), parts, failed_G, component="format", otherwise=0.25).tolist() == [
        0.25,
        1,
        0.25,
        -1,
    ]
    assert gate(rewards(1, 1, 1, -1), parts, failed_G, component="format", at_least=0.5).tolist() == [1, 1, 0, -1]


@pytest.mark.parametrize(
    "shaper",
    [lambda *words: weighted(*words, weights={"fromat": 1.0}), lambda *words: gate(*words, component="fromat")],
)
def test_a_component_that_no_verdict_has_is_named_unless_all_failed(shaper: Any) -> None:
    with pytest.raises(RewardError, match="'fromat'; did you mean 'format'"):
        shaper(rewards(1, 0), {"format": rewards(1, 1)}, np.array([False, True]))
    assert shaper(rewards(0, 0), {}, np.array([True, True])).tolist() == [0, 0]


def test_clip_and_affine() -> None:
    assert clip(rewards(-2, 0.5, 2), low=0.0, high=1.0).tolist() == [0, 0.5, 1]
    assert affine(rewards(0, 1), scale=2.0, shift=-1.0).tolist() == [-1, 1]
    with pytest.raises(RewardError, match="low = 2 is above high = 1"):
        clip(rewards(1), low=2.0)


def test_kl_sums_each_response_s_own_tokens() -> None:
    policy_N, reference_N = rewards(-1, -2, -0.5, -3), rewards(-1.5, -1, -0.5, -1)
    sequences = Sequences([2, 0, 2])
    distance = np.array([0.5, -1, 0, -2])
    estimates = {"k1": distance, "k2": distance**2 / 2, "k3": np.exp(-distance) - 1 + distance}
    for name, k in estimates.items():
        shaped_G = kl(rewards(1, 1, 1), policy_N, reference_N, sequences, coefficient=0.1, estimator=name)  # type: ignore[arg-type]
        assert shaped_G.tolist() == pytest.approx([1 - 0.1 * (k[0] + k[1]), 1, 1 - 0.1 * (k[2] + k[3])])


@pytest.mark.parametrize(
    ("settings", "strengths"),
    [
        ({"steps": 4}, {0: 0, 1: 0.25, 4: 1, 9: 1}),
        ({"steps": 4, "after": 2}, {0: 0, 2: 0, 3: 0.25, 6: 1}),
        ({"steps": 4, "start": 1.0, "end": 0.0}, {0: 1, 2: 0.5, 4: 0}),
        ({"steps": 4, "curve": "cosine"}, {0: 0, 1: (1 - math.cos(math.pi / 4)) / 2, 2: 0.5, 4: 1}),
        ({"steps": 1, "after": 3}, {3: 0, 4: 1}),
    ],
)
def test_scheduled_moves_from_no_shaper_to_the_whole(settings: Any, strengths: dict[int, float]) -> None:
    method = resolved({"name": "scheduled", "shaper": {"name": "truncation_value", "value": -1.0}, **settings})
    assert method.words == {"reward_G", "truncated_G", "step"}
    for step, strength in strengths.items():
        have = {"reward_G": rewards(1, 1), "truncated_G": np.array([True, False]), "step": step}
        assert method.call(have).tolist() == pytest.approx([1 - 2 * strength, 1])


def test_scheduled_takes_a_shaper_that_asks_for_the_step_or_not_for_rewards(tmp_path: Any) -> None:
    (tmp_path / "mine.py").write_text(
        "def late(step, length_G, answer=None, *, scale=1.0): return length_G * scale * step\n"
    )
    spec = {"name": f"{tmp_path}/mine.py:late", "scale": 2.0}
    method = resolved({"name": "scheduled", "shaper": spec, "steps": 2})
    assert method.words == {"reward_G", "step", "length_G", "answer"} and set(method.optional) == {"answer"}
    assert method.call({"reward_G": rewards(0, 0), "length_G": np.array([1, 2]), "step": 1}).tolist() == [1, 2]


def test_scheduled_remembers_what_its_shaper_remembers() -> None:
    spec = {"name": "scheduled", "shaper": "running_scale", "steps": 1, "start": 1.0}
    first, second = resolved(spec), resolved(spec)
    for values in ((0, 4), (3, 9)):
        first.call({"reward_G": rewards(*values), "step": 0})
    restore(second, memory(first))
    have = {"reward_G": rewards(1, 2), "step": 0}
    assert second.call(have).tolist() == first.call(have).tolist()
    assert memory(second) == memory(first) and memory(first)["inner_memory"]["count"] == 6


batches = st.lists(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=5), min_size=1, max_size=6)


@given(batches)
def test_running_scale_is_the_deviation_of_all_rewards_so_far(groups: list[list[float]]) -> None:
    scale, centred = running_scale(epsilon=1e-3), running_scale(epsilon=1e-3, centre=True)
    for i, group in enumerate(groups):
        so_far = np.concatenate([np.array(g, np.float64) for g in groups[: i + 1]])
        spread = so_far.std()
        divisor = spread + 1e-3 if spread > 1e-9 else None
        shaped_G, centred_G = scale(rewards(*group)), centred(rewards(*group))
        if divisor:
            assert shaped_G == pytest.approx(np.array(group) / divisor, rel=1e-3, abs=1e-3)
            assert centred_G == pytest.approx((np.array(group) - so_far.mean()) / divisor, rel=1e-3, abs=1e-3)


def test_running_scale_leaves_rewards_that_never_differ() -> None:
    assert running_scale()(rewards(3, 3)).tolist() == [3, 3]


def test_moving_baseline_is_the_unbiased_average_of_earlier_groups() -> None:
    baseline, means = moving_baseline(decay=0.9, initial=0.5), [1.0, 0.0, 4.0, 2.0]
    for n, mean in enumerate(means):
        weights = [0.9 ** (n - 1 - i) for i in range(n)]
        expected = sum(w * m for w, m in zip(weights, means, strict=False)) / sum(weights) if n else 0.5
        assert baseline(rewards(mean - 1, mean + 1)).tolist() == pytest.approx(
            [mean - 1 - expected, mean + 1 - expected]
        )
