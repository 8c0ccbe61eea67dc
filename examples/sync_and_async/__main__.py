"""One task trained twice, synchronously and asynchronously: `python -m examples.sync_and_async [key=value ...]`."""

import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.sync_and_async import task
from examples.warm_start import RUNS, Phase, from_nothing, settings
from millrace import Job, RunConfig
from millrace.cluster.cli import setting
from millrace.core.errors import MillraceError

RUN = Path(__file__).with_name("run.toml")
ARMS = {"synchronous": 0, "asynchronous": 4}  # max_lag, the one difference between the two
WARM_STEPS, BATCH_ROWS = 300, 32


def main(options: Mapping[str, Any]) -> None:
    """Make the model, train it in both ways, and compare.

    Args:
        options: of both runs, a dot in a key written as two underscores.
    """
    guesses = task.guesses(WARM_STEPS * BATCH_ROWS)
    from_nothing(
        "sync_and_async", Phase("now and then a number skipped", guesses, settings(WARM_STEPS, batch_rows=BATCH_ROWS))
    )
    found = {}
    for name, max_lag in ARMS.items():
        print(f"\n{name}: max_lag = {max_lag}", flush=True)
        shutil.rmtree(RUNS / name, ignore_errors=True)
        job = Job.submit(RunConfig.load(RUN, name=name, loop__max_lag=max_lag, **options), attached=True)
        for line in job.lines():
            print(f"  {line}", flush=True)
        job.wait()
        found[name] = summary(job.result(), [row for row in job.metrics() if "held_out" not in row])
    print(f"\n{table(found)}\n")
    print("Rates without the first step. On a machine without a GPU generation and learning share the cores: what one")
    print("gains, the other may lose. The held-out rewards are after equally many steps, not after equal time.")


def summary(result: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What is compared, in words.

    Args:
        result: of the run.
        steps: its rows of metrics.jsonl. The first step is left out of all rates: it waited for the engines to start.
    """
    later = steps[1:]
    seconds = sum(row["time/step_s"] for row in later)
    lags = {int(lag): many for lag, many in result["lag_histogram"].items()}
    return {
        "steps/s": f"{len(later) / seconds:.2f}",
        "samples/s": f"{sum(row['rollout/count'] for row in later) / seconds:.0f}",
        "trained tokens/s": f"{sum(row['train/tokens'] for row in later) / seconds:.0f}",
        "learner waits for data": f"{sum(row['time/wait_s'] for row in later) / seconds:.0%}",
        "engine waits for leave to go on": f"{result['idle']['generation-0']:.0%}",
        "mean lag, versions": f"{sum(lag * many for lag, many in lags.items()) / sum(lags.values()):.2f}",
        "largest lag": str(max(lags)),
        "held-out reward before": f"{result['held_out']['first']['mean']:.3f}",
        "held-out reward after": f"{result['held_out']['last']['mean']:.3f}",
        "tokens generated": str(result["tokens"]["generated"]),
        "tokens trained": str(result["tokens"]["trained"]),
    }


def table(arms: Mapping[str, Mapping[str, str]]) -> str:
    """A column per arm."""
    rows: Iterable[Sequence[str]] = zip(*(arm.values() for arm in arms.values()), strict=True)
    title = "".join(f"{name:>14}" for name in arms)
    width = max(map(len, next(iter(arms.values()))))
    lines = (
        f"{what:<{width}}" + "".join(f"{value:>14}" for value in row)
        for what, row in zip(next(iter(arms.values())), rows, strict=True)
    )
    return "\n".join([f"{'':<{width}}{title}", *lines])


if __name__ == "__main__":
    try:
        main({"__".join(keys): value for keys, value in map(setting, sys.argv[1:])})
    except MillraceError as caught:
        sys.exit(f"millrace: {caught}")
