"""The demo: `make demo`. No GPU, no download, about two minutes on two cores after set-up.

1. A character-level model with random weights is warm-started by supervised training, at the end on answers that are
   wrong on purpose, so that it knows the tasks but mostly answers badly.
2. Reinforcement learning through the real Ray actors and the real vLLM, once for each task.
"""

import json
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from examples import make_data, tiny_model
from examples.warm_start import train
from millrace.cluster import config, jobs
from millrace.cluster.runtime import ray_cluster
from millrace.core.errors import MillraceError
from millrace.learner.config import SupervisedConfig

HERE = Path(__file__).resolve().parent
RUNS = HERE.parent / "runs" / "demo"
TASKS = ("sorting", "arithmetic")
START_AT_MOST, END_AT_LEAST = 0.45, 0.9  # held-out mean reward, before and after
COMMON: dict[str, Any] = {
    "batch_rows": 64,
    "betas": (0.9, 0.95),
    "weight_decay": 0.01,
    "schedule": "linear",
    "threads": 1,
    "seed": 3,
}
PHASES = {
    "right": SupervisedConfig(learning_rate=3e-3, warmup_steps=20, decay_steps=1000, **COMMON),
    "noisy": SupervisedConfig(learning_rate=3e-4, warmup_steps=10, decay_steps=100, **COMMON),
}


def warm_start(folder: Path) -> float:
    """Write `folder/model`. Returns the seconds that training took."""
    seconds = 0.0
    model = folder / "random"
    tiny_model.build(model)
    files = dict(zip(PHASES, make_data.write_warm_start(folder), strict=True))
    for phase, settings in PHASES.items():
        out = folder / ("model" if phase == "noisy" else phase)
        seconds += train(model, files[phase], out, settings, name=f"{phase} answers")
        model = out
    return seconds


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Before and after, a row per task."""
    lines = [
        "task         held-out before   after   steps   seconds   samples/s   largest lag   tokens unaccounted for",
    ]
    for task, found in results.items():
        first, last = found["held_out"]["first"]["mean"], found["held_out"]["last"]["mean"]
        lag = max(map(int, found["lag_histogram"]))
        lines.append(
            f"{task:<12} {first:>15.3f} {last:>7.3f} {found['steps']:>7} {found['seconds']:>9.0f}"
            f" {found['throughput']['samples_per_s']:>11.0f} {lag:>13} {found['waste']['unaccounted']:>24}"
        )
    return "\n".join(lines)


def main() -> int:
    """Run the demo. Returns the exit status: 0 if every task ended where it should."""
    began = time.monotonic()
    shutil.rmtree(RUNS, ignore_errors=True)
    RUNS.mkdir(parents=True)
    wrong = ", ".join(f"{share:.0%} of {task}" for task, share in make_data.WRONG.items())
    print("1. Warm start: supervised training of a model with random weights, first on right answers,")
    print(f"   then on DELIBERATELY NOISY ones ({wrong} are wrong), so that it knows the tasks but answers badly.")
    seconds = warm_start(RUNS)
    print(f"   {seconds:.0f} s")
    results = {}
    with ray_cluster():
        for number, task in enumerate(TASKS, 2):
            print(f"\n{number}. Reinforcement learning on {task}: Ray actors, vLLM, asynchronous\n")
            results[task] = jobs.train(config.load(HERE / task / "run.toml", settings=[(["name"], task)]))
    (RUNS / "demo.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"\n{table(results)}\n\n{time.monotonic() - began:.0f} s in all; the runs and their models are in {RUNS}")
    missed = [
        task
        for task, found in results.items()
        if found["held_out"]["first"]["mean"] > START_AT_MOST or found["held_out"]["last"]["mean"] < END_AT_LEAST
    ]
    if missed:
        print(f"held-out reward should go from <= {START_AT_MOST} to >= {END_AT_LEAST}; not so: {', '.join(missed)}")
    return 1 if missed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MillraceError as caught:
        sys.exit(f"millrace: {caught}")
