"""What is kept of a reward is counted over seeds, the best correction is chosen on some and confirmed on others."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from benchmarks import lag_rewards, lag_task
from benchmarks.lag_rewards import CONFIRMING, FURTHER, JUDGED, LAGS, LEARNING_RATE, SEEDS, Key, Trial
from millrace.learner.objective import Objective

LEARNT_LITTLE, KEEPS_MOST = "cispo", "topr"


def trial(arm: str, lag: int, seed: int, reward: float) -> Trial:
    return Trial(
        arm=arm,
        lag=lag,
        seed=seed,
        learning_rate=LEARNING_RATE,
        reward=reward,
        mean_lag=0.9 * lag,
        largest_lag=lag,
        at_bound=0.9,
        unaccounted=0,
        seconds=1.0,
        made_of=lag_rewards.made_of(arm),
        commit="",
    )


def grid(lags: tuple[int, ...] = LAGS, seeds: range = SEEDS) -> dict[Key, Trial]:
    """All arms lose with the lag, one loses least, and one has learnt little but keeps it all."""
    loss = {KEEPS_MOST: 0.001, LEARNT_LITTLE: 0.0}
    start = {LEARNT_LITTLE: 0.5}
    made = [
        trial(arm, lag, seed, start.get(arm, 1.0) - loss.get(arm, 0.02) * min(lag, 16))
        for arm in lag_rewards.ARMS
        for lag in lags
        for seed in seeds
    ]
    return {each.key: each for each in made}


def judged() -> dict[Key, Trial]:
    """The grid, and all arms on the further seeds."""
    return grid() | grid(JUDGED, FURTHER)


def test_the_best_keeps_most_of_its_own_reward_and_of_the_naive_arms() -> None:
    assert lag_rewards.best(judged()) == KEEPS_MOST
    assert lag_rewards.best({}) is None and lag_rewards.best(grid()) is None


def test_who_fails_on_a_few_further_seeds_is_not_the_best() -> None:
    trials = judged()
    for lag in LAGS:
        for seed in SEEDS:  # another is the best of the grid
            key = Key("mis", lag, seed, LEARNING_RATE)
            trials[key] = replace(trials[key], reward=1.0)
    assert lag_rewards.finalists(trials)[:2] == ["mis", KEEPS_MOST]
    assert lag_rewards.best(trials) == KEEPS_MOST


def test_the_best_keeps_most_where_it_keeps_least() -> None:
    trials = judged()
    for seed in SEEDS:  # another keeps all at 16, and little at 8
        for lag, reward in {8: 0.9, 16: 1.0}.items():
            key = Key("mis", lag, seed, LEARNING_RATE)
            trials[key] = replace(trials[key], reward=reward)
    assert lag_rewards.best(trials) == KEEPS_MOST


def test_the_naive_arm_is_never_the_best() -> None:
    trials = judged()
    for seed in SEEDS:
        for lag in (8, 16):
            key = Key("none", lag, seed, LEARNING_RATE)
            trials[key] = replace(trials[key], reward=2.0)
    assert lag_rewards.best(trials) == KEEPS_MOST


def test_missing_trials_are_made_first_then_those_of_the_finalists_and_those_that_confirm_the_best() -> None:
    arms = tuple(lag_rewards.ARMS)
    ask = {"arms": arms, "lags": LAGS, "seeds": tuple(SEEDS)}
    assert len(lag_rewards.wanted({}, **ask)) == len(arms) * len(LAGS) * len(SEEDS)
    trials = grid()
    missing = trials.pop(Key("mis", 4, 3, LEARNING_RATE))
    assert lag_rewards.wanted(trials, **ask) == [missing.key]
    further = lag_rewards.wanted(grid(), **ask)
    assert {key.seed for key in further} == set(FURTHER)
    assert {key.lag for key in further if key.arm == "none"} == {0}
    assert {key.arm for key in further} == {"none", *lag_rewards.finalists(grid())}
    assert len(further) == (1 + 3 * len(JUDGED)) * len(FURTHER)
    confirm = lag_rewards.wanted(judged(), **ask)
    assert {key.arm for key in confirm} == {KEEPS_MOST}
    assert {key.seed for key in confirm} == set(CONFIRMING)
    assert {key.lag for key in confirm} == {0, 8, 16}
    assert not set(CONFIRMING) & {*SEEDS, *FURTHER}


def test_rows_have_the_targets_and_come_of_the_confirming_seeds() -> None:
    trials = judged()
    assert {row.id for row in lag_rewards.rows(trials, where="")} == {
        "P10/naive" if arm == "none" else f"P10/{arm}" for arm in lag_rewards.ARMS
    }
    confirmed = {key: each for key, each in grid((0, 8, 16), CONFIRMING).items() if key.arm == KEEPS_MOST}
    found = {row.id: row for row in lag_rewards.rows(trials | confirmed, where="")}
    at_8, at_16 = found["P10/best-at-8"], found["P10/best-at-16"]
    assert (at_8.target, at_16.target) == (">= 0.99", ">= 0.97")
    assert (at_8.reached, at_16.reached) == (True, True)
    assert at_8.value == pytest.approx(0.992)
    assert at_16.value == pytest.approx(0.984)
    assert found["P10/naive"].value == pytest.approx(0.68)
    lags = [row["max_lag"] for row in found["P10/naive"].details["by_lag"]]  # type: ignore[attr-defined]  # a list
    assert lags == [0, 1, 2, 4, 8, 16, "endless"]


def test_a_collapse_of_few_seeds_is_seen() -> None:
    found = lag_rewards.kept([1.0, 1.0, 1.0, 0.0, 0.0], [1.0] * 5)
    assert found.median == pytest.approx(0.6)
    assert found.low < 0.4


def test_trials_of_another_task_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    good, other = trial("none", 0, 0, 1.0), replace(trial("none", 0, 1, 1.0), made_of="another")
    path.write_text("".join(json.dumps(asdict(each)) + "\n" for each in (good, other)))
    assert list(lag_rewards.read(path)) == [good.key]
    assert lag_rewards.read(tmp_path / "none.jsonl") == {}


def test_processes_share_the_trials_without_gap_or_overlap() -> None:
    keys = lag_rewards.wanted({}, arms=["none", "topr"], lags=[0, 8], seeds=list(SEEDS))
    parts = [{key for key in keys if lag_rewards.share(key, 2) == part} for part in (0, 1)]
    assert parts[0] | parts[1] == set(keys)
    assert not parts[0] & parts[1]
    assert all(parts)


@pytest.mark.parametrize("arm", lag_rewards.ARMS)
def test_every_arm_is_a_recipe(arm: str) -> None:
    slots = {"advantage": "grpo", "aggregation": "token_mean", **lag_rewards.ARMS[arm]}
    corrected = arm != "none"
    behaviour = {"behaviour_logprob_N", "staleness_N"} & Objective.of(slots).asks
    assert bool(behaviour) == corrected


def test_the_chain_is_worth_what_is_right_before_the_first_mistake() -> None:
    assert lag_task.chain("", "cdeabc") == 0
    assert lag_task.chain("xdeabc", "cdeabc") == 0
    assert lag_task.chain("cdeabx", "cdeabc") == pytest.approx(5 / 6)
    assert lag_task.chain(lag_task.right("e"), "abcdea") == 1


def test_the_run_lets_generation_be_as_far_ahead_as_the_bound(tmp_path: Path) -> None:
    lag_task.write(tmp_path)
    config = lag_task.run(tmp_path, tmp_path / "runs", lag_rewards.ARMS["topr"], lag=8, seed=3, learning_rate=0.1)
    assert config.loop.max_lag == 8
    assert config.generation.slots >= config.loop.capacity * config.loop.group_size
    assert (config.seed, config.learner.seed, config.learner.learning_rate) == (3, 3, 0.1)
    held_out = [json.loads(line) for line in (tmp_path / "held_out.jsonl").read_text().splitlines()]
    train = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert len(train) == 20 and len(held_out) == 5
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
