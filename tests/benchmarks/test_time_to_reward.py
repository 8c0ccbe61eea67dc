"""When a curve crosses its target, and which trials make a row."""

from typing import Any

import pytest

from benchmarks import time_to_reward
from benchmarks.reward_arms import Setting


def curve(*rewards: float, s_per_step: float = 1.0) -> dict[str, Any]:
    points = [
        {"step": step, "seconds": s_per_step * step, "samples": 128 * step, "reward": reward}
        for step, reward in enumerate(rewards)
    ]
    return {"start_s": 3.0, "points": points, "facts": {}}


def trial(
    arm: str, seed: int, *rewards: float, s_per_step: float = 1.0, call: str = "one", **setting: Any
) -> dict[str, Any]:
    return {
        "arm": arm,
        "seed": seed,
        "setting": setting,
        "chosen": {},
        "call": call,
        "curve": curve(*rewards, s_per_step=s_per_step),
    }


def test_a_crossing_lies_between_the_evaluations_around_it() -> None:
    found = time_to_reward.crossing(curve(0.2, 0.8, 0.84, 0.94, s_per_step=2.0), 0.9)
    assert found["seconds"] == pytest.approx(4.0 + 2.0 * 0.6)
    assert found["samples"] == pytest.approx(256 + 128 * 0.6)


def test_the_first_crossing_counts_also_when_the_reward_falls_again() -> None:
    assert time_to_reward.crossing(curve(0.8, 1.0, 0.5, 1.0), 0.9)["seconds"] == pytest.approx(0.5)


def test_a_policy_that_is_good_from_the_start_took_no_time() -> None:
    assert time_to_reward.crossing(curve(0.95, 0.99), 0.9) == {"seconds": 0.0, "samples": 0.0}


def test_a_curve_that_never_gets_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"0\.850 at best"):
        time_to_reward.crossing(curve(0.2, 0.85, 0.8), 0.9)


def test_rows_pair_the_seeds_that_both_arms_have() -> None:
    trials = [
        trial("trl", 0, 0.5, 1.0, s_per_step=8.0),
        trial("trl", 1, 0.5, 1.0, s_per_step=4.0),
        trial("trl", 2, 0.5, 1.0, s_per_step=1.0),
        trial("vllm", 0, 0.5, 1.0, s_per_step=2.0),
        trial("vllm", 1, 0.5, 0.5, 1.0, s_per_step=1.0),
        trial("vllm", 7, 0.5, 1.0),
    ]
    seconds, samples = time_to_reward.rows(trials, 0.75, "here")
    assert (seconds.id, samples.id) == ("P12/seconds-vllm", "P12/samples-vllm")
    assert seconds.details["seeds"] == [0, 1]
    assert seconds.value == pytest.approx((1 / 4 + 1.5 / 2) / 2)
    assert seconds.reached is True
    assert samples.value == pytest.approx((1 + 3) / 2)
    assert samples.reached is False


def test_arms_that_ran_in_different_calls_make_no_row() -> None:
    trials = [
        trial("trl", 0, 0.5, 1.0, s_per_step=8.0),
        trial("trl", 1, 0.5, 1.0, s_per_step=4.0),
        trial("vllm", 0, 0.5, 1.0, call="another"),
        trial("vllm", 1, 0.5, 1.0),
        trial("transformers", 0, 0.5, 1.0, call="another"),
    ]
    found = time_to_reward.rows(trials, 0.75, "here")
    assert [(row.id, row.details["seeds"]) for row in found] == [("P12/seconds-vllm", [1]), ("P12/samples-vllm", [1])]


def test_new_trials_replace_their_own_and_keep_the_others() -> None:
    old = [trial("trl", 0, 0.1, every=2), trial("trl", 1, 0.2, every=2), trial("vllm", 0, 0.3, every=2)]
    found = time_to_reward.merged(old, [trial("trl", 1, 0.9, every=2), trial("vllm", 1, 0.4, every=2)])
    assert [(each["arm"], each["seed"], each["curve"]["points"][0]["reward"]) for each in found] == [
        ("trl", 0, 0.1),
        ("trl", 1, 0.9),
        ("vllm", 0, 0.3),
        ("vllm", 1, 0.4),
    ]


def test_trials_of_another_setting_are_dropped() -> None:
    found = time_to_reward.merged([trial("trl", 0, 0.1, every=5)], [trial("vllm", 0, 0.9, every=2)])
    assert [each["arm"] for each in found] == ["vllm"]


def test_a_trial_names_the_setting_but_no_path() -> None:
    from_curve = time_to_reward.Curve(start_s=1.0, points=())
    found = time_to_reward.trial("trl", Setting(model="/a/b", seed=3, steps=9), {}, from_curve, "now")
    assert found["seed"] == 3
    assert found["setting"]["group_size"] == 8
    assert "/a/b" not in str(found)
