"""Time and samples to a held-out reward of 0.9 on long-tailed answers: ours against TRL's GRPOTrainer.

Same model, data, verifier, group size, samples per step, learning rate and optimiser. The arms run one after the other,
seed by seed. A crossing is interpolated between the last evaluation below the target and the next, for both alike.

    python -m benchmarks.time_to_reward                       all seeds, then rows
    python -m benchmarks.time_to_reward --seeds 0,1           these; rows are of all pairs that are recorded

A pair is two arms of one seed in one call: machines change from hour to hour.
"""

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.reward_arms import Curve, Setting, ours, trl, warm_started

TRIALS = harness.RESULTS / "trials" / "time_to_reward.json"
MODEL = harness.ROOT / "runs" / "benchmarks" / "long_tail"
STEPS = 64  # at most; TRL's run ends at the target, ours is scored when it has ended
LEARNING_RATE = 6e-5
THREADS = 2  # TRL's
OURS: Mapping[str, Mapping[str, Any]] = {
    "loop": {"max_lag": 8},
    "generation": {"slots": 128},
    "learner": {"threads": 1},
}
TARGETS: Mapping[str, harness.Target] = {"seconds": ("<=", 0.5), "samples": ("<=", 1.05)}


def crossing(curve: Mapping[str, Any], target: float) -> dict[str, float]:
    """Seconds and samples at which the held-out reward reached the target.

    Raises:
        ValueError: it never did.

    >>> points = [{"step": s, "seconds": 2.0 * s, "samples": 8 * s, "reward": 0.1 * s} for s in (0, 4, 8)]
    >>> crossing({"points": points}, 0.5)
    {'seconds': 10.0, 'samples': 40.0}
    """
    points = curve["points"]
    at = next((i for i, point in enumerate(points) if point["reward"] >= target), None)
    if at is None:
        best = max(point["reward"] for point in points)
        raise ValueError(f"held-out reward {best:.3f} at best, {target:g} was never reached: give the run more steps")
    above, below = points[at], points[max(0, at - 1)]
    rise = above["reward"] - below["reward"]
    share = (target - below["reward"]) / rise if rise > 0 else 1.0
    return {key: below[key] + share * (above[key] - below[key]) for key in ("seconds", "samples")}


def rows(trials: Sequence[Mapping[str, Any]], target: float, where: str) -> list[harness.Row]:
    """Of every arm of ours, against TRL's run of the same seed in the same call; what has none is left out."""
    found = {(trial["arm"], trial["seed"]): crossing(trial["curve"], target) for trial in trials}
    by_key = {(trial["arm"], trial["seed"]): trial for trial in trials}
    made = []
    for arm in sorted({trial["arm"] for trial in trials} - {"trl"}):
        seeds = sorted(
            seed
            for each, seed in found
            if each == arm and ("trl", seed) in found and by_key[arm, seed]["call"] == by_key["trl", seed]["call"]
        )
        if not seeds:
            continue
        for unit, limit in TARGETS.items():
            measured = {name: [found[name, seed][unit] for seed in seeds] for name in (arm, "trl")}
            details = {
                "seeds": seeds,
                **{f"{unit}_{name}": values for name, values in measured.items()},
                **{f"start_s_{name}": [by_key[name, s]["curve"]["start_s"] for s in seeds] for name in (arm, "trl")},
                "held_out_before": by_key["trl", seeds[0]]["curve"]["points"][0]["reward"],
                "settings": {name: by_key[name, seeds[0]]["chosen"] for name in (arm, "trl")},
                "facts": by_key[arm, seeds[-1]]["curve"]["facts"],
            }
            what = f"{unit} to held-out reward {target:g} / TRL GRPOTrainer, long-tailed answers, {arm} engine"
            value = harness.ratio(measured[arm], measured["trl"])
            made.append(harness.row(f"P12/{unit}-{arm}", what, value, target=limit, where=where, details=details))
    return made


def merged(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """All trials; a new one takes the place of the old one of its arm and seed. Those of another setting are dropped:
    they cannot be compared."""
    kept = [trial for trial in old if all(trial["setting"] == each["setting"] for each in new)]
    trials = {(trial["arm"], trial["seed"]): trial for trial in (*kept, *new)}
    return [trials[key] for key in sorted(trials)]


def run(arm: str, setting: Setting, chosen: Mapping[str, Any], folder: Path) -> Curve:
    """One run of an arm."""
    if arm == "trl":
        return trl(setting, chosen, threads=THREADS, say=print)
    return ours(setting, folder / arm, chosen)


def trial(arm: str, setting: Setting, chosen: Mapping[str, Any], curve: Curve, call: str) -> dict[str, Any]:
    """A run as it is recorded; the setting without what differs from seed to seed and machine to machine.

    Args:
        call: of this script, in which it was made.
    """
    common = {key: value for key, value in asdict(setting).items() if key not in ("model", "seed", "steps")}
    return {
        "arm": arm,
        "seed": setting.seed,
        "setting": common,
        "chosen": chosen,
        "call": call,
        "commit": harness.commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "curve": asdict(curve),
    }


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = harness.arguments(__doc__)
    parser.set_defaults(pairs=5)
    parser.add_argument("--seeds", help="comma-separated, instead of 0 to PAIRS - 1")
    parser.add_argument("--arms", default="trl,vllm,transformers", help="which to run (default: all)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of a run, at most (default {STEPS})")
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE, help=f"(default {LEARNING_RATE:g})")
    parser.add_argument("--ours", type=json.loads, default={}, help="JSON: section -> key -> value of our runs")
    parser.add_argument("--trl", type=json.loads, default={}, help="JSON: settings of GRPOConfig")
    given = parser.parse_args()
    given.seeds = [int(seed) for seed in given.seeds.split(",")] if given.seeds else list(range(given.pairs))
    return given


def main() -> None:
    """Run the arms seed by seed, keep each curve as it comes, and make rows of all that are kept."""
    given = parsed()
    harness.refuse_a_busy_machine(anyway=given.busy)
    where = harness.machine()
    call = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S}, {where}"
    model = warm_started(MODEL)
    trials = json.loads(TRIALS.read_text()) if TRIALS.exists() and not given.no_record else []
    for seed in given.seeds:
        with tempfile.TemporaryDirectory() as folder:
            for arm in given.arms.split(","):
                setting = Setting(model=str(model), seed=seed, steps=given.steps, learning_rate=given.learning_rate)
                chosen = configured(arm, given)
                new = trial(arm, setting, chosen, run(arm, setting, chosen, Path(folder)), call)
                told(new, setting.target)
                trials = merged(trials, [new])
                if not given.no_record:
                    TRIALS.parent.mkdir(parents=True, exist_ok=True)
                    TRIALS.write_text(json.dumps(trials, indent=1) + "\n")
    found = rows(trials, Setting(model="", seed=0, steps=0).target, where)
    if given.no_record:
        print("\n".join(f"{row.id}: {row.value:.3f} {row.interval}" for row in found))
    else:
        harness.record(found)


def configured(arm: str, given: argparse.Namespace) -> dict[str, Any]:
    """What an arm's configuration says besides the common setting."""
    if arm == "trl":
        return dict(given.trl)
    chosen: dict[str, Any] = {"generation": {"engine": arm}}
    for table in (OURS, given.ours):
        for section, values in table.items():
            chosen[section] = {**chosen.get(section, {}), **values}
    return chosen


def told(trial: Mapping[str, Any], target: float) -> None:
    """Print a run in a line."""
    curve = trial["curve"]
    rewards = " ".join(f"{point['reward']:.2f}" for point in curve["points"])
    print(f"seed {trial['seed']} {trial['arm']}: start {curve['start_s']:.1f} s, rewards {rewards}", flush=True)
    print(f"  {json.dumps(curve['facts'])}")
    try:
        print(f"  {target:g} reached after {crossing(curve, target)}", flush=True)
    except ValueError as caught:
        print(f"  {caught}", flush=True)


if __name__ == "__main__":
    main()
