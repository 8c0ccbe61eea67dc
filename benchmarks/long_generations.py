"""P13: trained tokens over generated ones, with an update after every step and responses that last for several steps.

A whole run on Ray and vLLM whose responses are longer than a step, so that weights change within nearly all of them.
The last max_lag steps are excluded: what is under way when a run ends can be trained by no step. A response whose
first token was sampled with version v must be trained by step v + max_lag, so of all that began with a version below
steps - max_lag the fate is known, and whatever the ledger lost or gave up on the way counts against the run.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import pyarrow.parquet as pq

from benchmarks import harness, runs
from benchmarks.sorting_run import sorting_run
from examples import tiny_model
from millrace.cluster.runtime import ray_cluster
from millrace.core.replay.rollouts import NAME

MAX_TOKENS = 200


@dataclass(frozen=True, slots=True)
class Fate:
    """Of one rollout in the ledger."""

    tokens: int
    first: int  # version that sampled its first token
    last: int
    trained: bool


def share_trained(fates: Sequence[Fate], waste: Mapping[str, int], *, before: int) -> float:
    """Trained tokens over generated ones, of all rollouts that began with a version below `before`.

    Args:
        waste: the ledger's rows. Tokens of no stored rollout count as generated, unless the end left them under way.

    >>> fates = [Fate(90, 0, 2, True), Fate(10, 1, 3, False), Fate(50, 7, 9, False)]
    >>> share_trained(fates, {"generated": 180, "in_flight": 20, "queued": 50}, before=5)
    0.8181818181818182
    """
    settled = [fate for fate in fates if fate.first < before]
    lost = max(0, waste["generated"] - waste.get("in_flight", 0) - sum(fate.tokens for fate in fates))
    generated = sum(fate.tokens for fate in settled) + lost
    return sum(fate.tokens for fate in settled if fate.trained) / generated


def fates_of(directory: Path) -> list[Fate]:
    """Of every rollout that the finished run stored."""
    columns = ["tokens", "version_first", "version_last", "state"]
    table = pq.read_table(directory / NAME, columns=columns).to_pydict()
    return [
        Fate(len(tokens), first, last, state in ("trained", "committed"))
        for tokens, first, last, state in zip(*(table[name] for name in columns), strict=True)
    ]


def long_run(*, steps: int, max_lag: int) -> dict[str, Any]:
    """Four times as many responses under way as a step trains, each up to 200 tokens."""
    table = sorting_run(steps=steps, groups_per_step=4)
    del table["data"]["held_out"], table["evaluation"]
    table["loop"] |= {"group_size": 4, "max_lag": max_lag}
    table["sampling"] = {"max_tokens": MAX_TOKENS}
    table["generation"] = {"engine": "vllm", "slots": 64, "prefetch": 0}
    table["learner"] = {"learning_rate": 1e-6}  # so that lengths stay as they are
    return table


def measure(*, steps: int, max_lag: int) -> tuple[float, dict[str, Any]]:
    """The share of one run, and what proves that its responses span versions."""
    with tempfile.TemporaryDirectory() as name, ray_cluster():
        root = Path(name)
        tiny_model.build(root / "model")
        done = runs.execute(long_run(steps=steps, max_lag=max_lag), root=root, name="long")
        fates = fates_of(done.directory)
    waste = done.result["waste"]
    before = steps - max_lag
    trained = [fate for fate in fates if fate.trained]
    spans = [fate.last - fate.first + 1 for fate in trained]
    return share_trained(fates, waste, before=before), {
        "steps": steps,
        "max_lag": max_lag,
        "waste_ledger": dict(waste),
        "whole_run_trained_over_generated": waste["trained"] / waste["generated"],
        "rollouts_that_began_in_time": sum(fate.first < before for fate in fates),
        "trained_rollouts": len(trained),
        "tokens_per_rollout": mean(fate.tokens for fate in trained),
        "versions_per_rollout": {
            "median": median(spans),
            "mean": mean(spans),
            "histogram": {str(span): many for span, many in sorted(Counter(spans).items())},
        },
        "rollouts_of_several_versions": mean(span > 1 for span in spans),
        "lag_histogram": done.result["lag_histogram"],
        "seconds": done.result["seconds"],
        "limit": "1",
    }


def main() -> None:
    """One run; the figure is counted."""
    parser = harness.arguments(__doc__)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--max-lag", type=int, default=8)
    given = parser.parse_args()
    harness.refuse_a_busy_machine(anyway=given.busy)
    where = harness.machine()
    found, details = measure(steps=given.steps, max_lag=given.max_lag)
    what = (
        f"trained / generated tokens, weights updated at every step, responses of {details['tokens_per_rollout']:.0f} "
        f"tokens over {details['versions_per_rollout']['mean']:.1f} versions, without the last {given.max_lag} steps"
    )
    row = harness.row("P13", what, found, target=(">=", 0.98), where=where, details=details)
    if given.no_record:
        print(f"{row.value:.4f} {row.details}")
    else:
        harness.record([row])


if __name__ == "__main__":
    main()
