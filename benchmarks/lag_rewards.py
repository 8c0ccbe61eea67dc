"""Final held-out reward by staleness, for each off-policy correction: the loop itself, in process, on lag_task.py.

Every trial is a whole run (queue, generation, judge, learner, held-out evaluation) of the same number of steps, at the
same learning rate; corrections are tables of a recipe's slots. The generation is always as far ahead as admission
lets it be, so that the samples of `max_lag = L` are L updates old but for the first steps, and each trial says how old
they were. Trials are kept, a line each, in results/lag_rewards_trials.jsonl, and only missing ones are made:

    python -m benchmarks.lag_rewards --learning-rates      # rewards at lag 0 alone choose the learning rate
    python -m benchmarks.lag_rewards --part 1/2            # two processes share the trials
    python -m benchmarks.lag_rewards --rows                # record the rows

The best corrections of the first seeds are tried on further ones, the best of these is chosen on all of them, and
measured on seeds that have chosen nothing.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch

from benchmarks import harness, lag_task
from millrace.cluster import jobs

TRIALS = harness.RESULTS / "lag_rewards_trials.jsonl"
LEARNING_RATE = 0.2
SWEEP = (0.05, 0.1, 0.2, 0.4)
SWEPT, SWEPT_SEEDS = ("none", "cispo", "topr"), range(3)
LAGS = (0, 8, 16, 4, lag_task.ENDLESS, 2, 1)  # in the order they are tried
SEEDS, FURTHER, CONFIRMING = range(5), range(5, 15), range(15, 25)
FINALISTS = 3  # corrections that are tried on the further seeds: a few runs in ten may fail where none in five does
TARGETS = {8: 0.99, 16: 0.97}
JUDGED = (0, *TARGETS)  # the lags by which a correction is judged
NAIVE = "none"

CLIP = {"ratio": "token", "surrogate": {"name": "clip", "low": 0.2, "high": 0.2}}
# Name -> slots of the objective. The ratio `token` is to the policy as the step began, whoever sampled.
ARMS: Mapping[str, Mapping[str, Any]] = {
    "none": CLIP,
    "truncated_importance": {**CLIP, "corrections": [{"name": "truncated_importance", "cap": 2.0}]},
    "behaviour_clip": {**CLIP, "ratio": "behaviour"},
    "decoupled_ppo": {**CLIP, "corrections": [{"name": "truncated_importance", "cap": 5.0}]},
    "cispo": {"ratio": "behaviour", "surrogate": {"name": "cispo", "low": 1.0, "high": 4.0}},
    "sequence_truncated": {**CLIP, "corrections": [{"name": "sequence_truncated_importance", "cap": 2.0}]},
    "sequence_masked": {**CLIP, "corrections": [{"name": "sequence_masked_importance", "high": 2.0}]},
    "topr": {"surrogate": "reinforce", "corrections": ["tapered_importance"]},
    "a3po": {
        **CLIP,
        "proximal": "interpolated",
        "corrections": [{"name": "truncated_importance", "cap": 5.0}],
    },
    "mis": {**CLIP, "corrections": [{"name": "icepop", "low": 0.0, "high": 2.0}]},
    "icepop": {**CLIP, "corrections": [{"name": "icepop", "low": 0.5, "high": 5.0}]},
    "off_policy_mask": {**CLIP, "corrections": ["off_policy_mask"]},
    "age_decay": {
        **CLIP,
        "corrections": [{"name": "truncated_importance", "cap": 2.0}, {"name": "age_decay", "power": 0.5}],
    },
}


@dataclass(frozen=True, slots=True, order=True)
class Key:
    """Which trial."""

    arm: str
    lag: int  # the bound
    seed: int
    learning_rate: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What one came to."""

    arm: str
    lag: int
    seed: int
    learning_rate: float
    reward: float  # held-out mean of the final policy
    mean_lag: float  # of the trained samples
    largest_lag: int
    at_bound: float  # share of the samples that were as old as allowed
    unaccounted: int  # tokens
    seconds: float
    made_of: str  # digest of the task and the arm: a trial of other ones is not taken for it
    commit: str

    @property
    def key(self) -> Key:
        return Key(self.arm, self.lag, self.seed, self.learning_rate)


def made_of(arm: str) -> str:
    """A digest of the task and of the arm's slots."""
    task = (lag_task.STEPS, lag_task.GROUPS_PER_STEP, lag_task.GROUP_SIZE, lag_task.MINIBATCHES)
    parts = (task, lag_task.LETTERS, lag_task.ANSWER, lag_task.EVALUATION_SAMPLES, ARMS[arm])
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def read(path: Path = TRIALS) -> dict[Key, Trial]:
    """The trials that are there, of the task and the arms as they are now; the last one of each key."""
    lines = path.read_text().splitlines() if path.exists() else ()
    found = (Trial(**json.loads(line)) for line in lines)
    return {each.key: each for each in found if each.arm in ARMS and each.made_of == made_of(each.arm)}


def make(key: Key, *, commit: str) -> Trial:
    """Run it, in a directory of its own."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        lag_task.write(folder)
        config = lag_task.run(
            folder, folder / "runs", ARMS[key.arm], lag=key.lag, seed=key.seed, learning_rate=key.learning_rate
        )
        found = jobs.train(config, local=True, say=lambda line: None)
    many = {int(lag): samples for lag, samples in found["lag_histogram"].items()}
    total = sum(many.values())
    return Trial(
        **asdict(key),
        reward=found["held_out"]["last"]["mean"],
        mean_lag=sum(lag * samples for lag, samples in many.items()) / total,
        largest_lag=max(many),
        at_bound=many.get(key.lag, 0) / total,
        unaccounted=found["waste"]["unaccounted"],
        seconds=round(time.perf_counter() - began, 2),
        made_of=made_of(key.arm),
        commit=commit,
    )


def wanted(trials: Mapping[Key, Trial], *, arms: Sequence[str], lags: Sequence[int], seeds: Sequence[int]) -> list[Key]:
    """Trials still to be made: the grid, then those of the finalists, then those that confirm the best."""
    grid = [Key(arm, lag, seed, LEARNING_RATE) for lag in lags for seed in seeds for arm in arms]
    if missing := [key for key in grid if key not in trials]:
        return missing
    judged = [Key(arm, lag, seed, LEARNING_RATE) for arm in finalists(trials) for lag in JUDGED for seed in FURTHER]
    judged += [Key(NAIVE, 0, seed, LEARNING_RATE) for seed in FURTHER]
    if missing := [key for key in judged if key not in trials]:
        return missing
    arm = best(trials)
    confirm = [Key(arm, lag, seed, LEARNING_RATE) for lag in JUDGED for seed in CONFIRMING] if arm else []
    return [key for key in confirm if key not in trials]


def rewards(trials: Mapping[Key, Trial], arm: str, lag: int, seeds: Iterable[int]) -> list[float]:
    """Final rewards, by seed; empty if one of them is missing."""
    keys = [Key(arm, lag, seed, LEARNING_RATE) for seed in seeds]
    return [trials[key].reward for key in keys] if all(key in trials for key in keys) else []


def kept(above: Sequence[float], below: Sequence[float]) -> harness.Ratio:
    """Mean of the one over mean of the other, and the bootstrap's 95 % interval over the paired seeds.

    Of means and not the median of ratios: that would not see a collapse of two seeds in five.

    >>> print(kept([1.0, 0.5], [1.0, 1.0]))
    0.750 [0.500, 1.000]
    """
    above_S, below_S = np.asarray(above), np.asarray(below)
    drawn = np.random.default_rng(0).integers(len(above_S), size=(harness.RESAMPLES, len(above_S)))
    ratios = above_S[drawn].mean(1) / below_S[drawn].mean(1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return harness.Ratio(median=float(above_S.mean() / below_S.mean()), low=float(low), high=float(high))


def scores(trials: Mapping[Key, Trial], arms: Iterable[str], seeds: Sequence[int]) -> dict[str, float]:
    """What each correction keeps at the lags with a target, where it keeps least.

    It is measured against its own reward at lag 0 and against the naive arm's there, and the lesser counts: to have
    learnt little to begin with is no merit. Corrections of which a trial is missing are left out.
    """
    found = {}
    naive = rewards(trials, NAIVE, 0, seeds)
    for arm in arms:
        own, at = rewards(trials, arm, 0, seeds), [rewards(trials, arm, lag, seeds) for lag in TARGETS]
        if arm != NAIVE and naive and own and all(at):
            found[arm] = min(kept(each, below).median for each in at for below in (own, naive))
    return found


def finalists(trials: Mapping[Key, Trial]) -> list[str]:
    """The corrections that keep most on the seeds of the grid, best first."""
    found = scores(trials, ARMS, SEEDS)
    return sorted(found, key=lambda arm: -found[arm])[:FINALISTS]


def best(trials: Mapping[Key, Trial]) -> str | None:
    """The finalist that keeps most on the seeds of the grid and the further ones together."""
    found = scores(trials, finalists(trials), [*SEEDS, *FURTHER])
    return max(found, key=lambda arm: found[arm], default=None)


def table(trials: Mapping[Key, Trial], arm: str) -> list[dict[str, object]]:
    """A row for each lag that has all seeds: rewards, what is kept of those at lag 0, and how old the samples were."""
    rows: list[dict[str, object]] = []
    own, naive = rewards(trials, arm, 0, SEEDS), rewards(trials, NAIVE, 0, SEEDS)
    for lag in sorted(LAGS):
        at = rewards(trials, arm, lag, SEEDS)
        if not at:
            continue
        its = [trials[Key(arm, lag, seed, LEARNING_RATE)] for seed in SEEDS]
        rows.append(
            {
                "max_lag": "endless" if lag == lag_task.ENDLESS else lag,
                "reward": round(float(np.mean(at)), 4),
                "rewards": [round(each, 4) for each in at],
                "kept": str(kept(at, own)) if own else None,
                "over_naive_at_0": round(kept(at, naive).median, 4) if naive else None,
                "mean_lag": round(float(np.mean([each.mean_lag for each in its])), 2),
                "largest_lag": max(each.largest_lag for each in its),
                "at_bound": round(float(np.mean([each.at_bound for each in its])), 3),
            }
        )
    return rows


def rows(trials: Mapping[Key, Trial], *, where: str) -> list[harness.Row]:
    """What is recorded: a row per correction, and the best at each target."""
    made: list[harness.Row] = []
    for arm in ARMS:
        at, own = rewards(trials, arm, 16, SEEDS), rewards(trials, arm, 0, SEEDS)
        if at and own:
            name = "naive" if arm == NAIVE else arm
            what = f"final reward at max_lag 16 / at 0, {name}, {len(SEEDS)} seeds"
            details = {"slots": ARMS[arm], "learning_rate": LEARNING_RATE, "by_lag": table(trials, arm)}
            made.append(harness.row(f"P10/{name}", what, kept(at, own), target=None, where=where, details=details))
    arm = best(trials) or NAIVE
    for lag, share in TARGETS.items():
        at, own = (rewards(trials, arm, each, CONFIRMING) for each in (lag, 0))
        if not (at and own):
            continue
        grid = {each: found for each in ARMS if (found := rewards(trials, each, lag, SEEDS))}
        chosen_on = [*SEEDS, *FURTHER]
        what = f"final reward at max_lag {lag} / at 0, {arm}, which was the best of {len(grid)} on other seeds"
        details = {
            "rewards": at,
            "rewards_at_0": own,
            "over_naive_at_0": round(float(np.mean(at) / np.mean(rewards(trials, NAIVE, 0, SEEDS))), 4),
            "chosen_on": {each: round(float(np.mean(found)), 4) for each, found in grid.items()},
            "finalists": {
                each: round(found, 4) for each, found in scores(trials, finalists(trials), chosen_on).items()
            },
            "seeds": [CONFIRMING.start, CONFIRMING.stop],
        }
        made.append(
            harness.row(f"P10/best-at-{lag}", what, kept(at, own), target=(">=", share), where=where, details=details)
        )
    return made


def sweep(trials: Mapping[Key, Trial]) -> list[dict[str, object]]:
    """Rewards at lag 0 by learning rate."""
    found: list[dict[str, object]] = []
    for rate in SWEEP:
        by_arm = {
            arm: [trials[key].reward for seed in SWEPT_SEEDS if (key := Key(arm, 0, seed, rate)) in trials]
            for arm in SWEPT
        }
        found.append({"learning_rate": rate, **{arm: round(float(np.mean(r)), 4) for arm, r in by_arm.items() if r}})
    return found


def work(keys: Sequence[Key], *, budget_s: float) -> None:
    """Make them until the time is over."""
    began, commit = time.monotonic(), harness.commit()
    TRIALS.parent.mkdir(exist_ok=True)
    for number, key in enumerate(keys):
        if time.monotonic() - began > budget_s:
            print(f"{len(keys) - number} trials are left for another call")
            return
        made = make(key, commit=commit)
        with TRIALS.open("a") as file:
            file.write(json.dumps(asdict(made)) + "\n")
        print(
            f"  {made.arm} lag {made.lag} seed {made.seed} rate {made.learning_rate:g}: {made.reward:.3f}", flush=True
        )


def share(key: Key, parts: int) -> int:
    """Which of so many processes makes it, whenever each of them begins."""
    return crc32(repr(key).encode()) % parts


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    """Make the trials that are missing, or record the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--corrections", default=",".join(ARMS), help="arms, separated by commas (default all)")
    parser.add_argument("--lags", type=_numbers, default=list(LAGS), help=f"{lag_task.ENDLESS} is endless")
    parser.add_argument("--seeds", type=_numbers, default=list(SEEDS))
    parser.add_argument("--part", default="1/1", help="which of how many processes that share the trials")
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="no trial is begun after so long")
    parser.add_argument("--learning-rates", action="store_true", help="only trials at lag 0, of several rates")
    parser.add_argument("--rows", action="store_true", help="record the rows of the trials that are there")
    given = parser.parse_args()
    torch.set_num_threads(1)
    trials = read()
    if given.rows:
        harness.record(rows(trials, where=harness.machine()))
        print(*sweep(trials), sep="\n")
        return
    arms = given.corrections.split(",")
    keys = wanted(trials, arms=arms, lags=given.lags, seeds=given.seeds)
    if given.learning_rates:
        keys = [Key(arm, 0, seed, rate) for rate in SWEEP for arm in SWEPT for seed in SWEPT_SEEDS]
        keys = [key for key in keys if key not in trials]
    part, parts = map(int, given.part.split("/"))
    work([key for key in keys if share(key, parts) == part - 1], budget_s=given.budget_s)


if __name__ == "__main__":
    main()
