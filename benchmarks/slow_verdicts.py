"""Steps per second when one verdict in ten takes ten seconds, against a run whose verdicts are all fast.

Whole runs on Ray and vLLM. By Little's law slow verdicts need places of their own: rewards.concurrency >= rollouts/s
times the mean seconds of a verdict; and the loop must be allowed to be as far ahead as they last: max_lag >= their
seconds times steps/s. `needs` computes both, and the run is given a little more. The first steps, which fill the
line, and the last max_lag ones, which find no further groups behind those that wait, are left out in both arms.
Between them enough are measured: the groups of about seven steps wait in the slow arm, and while they become more or
fewer with the engine's speed the learner's rate is not the engine's; over 25 steps that alone made up to a tenth.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import json
import tempfile
from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness
from benchmarks.runs import Finished, execute
from benchmarks.slow_reward import SECONDS, SHARE
from benchmarks.sorting_run import sorting_run
from examples import tiny_model
from millrace.cluster.runtime import ENVIRONMENT, ray_cluster

TARGET = 0.95
GROUP_SIZE = 8


def needs(*, rollouts_per_s: float, steps_per_s: float, share: float, seconds: float) -> dict[str, int]:
    """What slow verdicts ask for: judges at work by Little's law, and versions that pass while one is made.

    A group waits for its slowest verdict, so that the lag is that of a slow verdict, whatever their share. One
    version more passes while the group is generated, and one while its batch is trained.

    >>> needs(rollouts_per_s=500, steps_per_s=1.0, share=0.1, seconds=10)
    {'verdicts_at_once': 500, 'max_lag': 12}
    """
    return {
        "verdicts_at_once": ceil(rollouts_per_s * share * seconds),
        "max_lag": ceil(steps_per_s * seconds) + 2,
    }


def steady(rows: Sequence[Mapping[str, Any]], *, first: int, last: int) -> float:
    """Steps per second between the ends of two steps.

    >>> steady([{"step": i, "time/step_s": 0.5} for i in range(1, 9)], first=2, last=6)
    2.0
    """
    spent = [row["time/step_s"] for row in rows if first < row["step"] <= last]
    return len(spent) / sum(spent)


def table(given: Any) -> dict[str, Any]:
    """The run, the same in both arms."""
    run = sorting_run(steps=given.filling + given.steps + given.max_lag, groups_per_step=given.groups)
    run["rewards"] = {
        "verifier": f"{Path(__file__).with_name('slow_reward.py')}:slow_position_match",
        "concurrency": given.concurrency,
    }
    run["loop"] |= {"max_lag": given.max_lag, "stale": given.stale}
    run["learner"]["learning_rate"] = 1e-6  # lengths stay what they are, in both arms
    del run["data"]["held_out"]
    for name in given.drop:
        del run["rewards"][name]
    return run


def waits(rows: Sequence[Mapping[str, Any]], *, first: int, last: int) -> dict[str, float]:
    """What the learner's time went on, shares."""
    window = [row for row in rows if first < row["step"] <= last]
    total = sum(row["time/step_s"] for row in window)
    names = sorted({name for row in window for name in row if name.startswith(("idle/", "time/"))})
    found = {name: sum(row.get(name) or 0.0 for row in window) / total for name in names}
    return {name: round(share, 3) for name, share in found.items() if name != "time/step_s" and share > 0.001}


def main() -> None:
    """Measure."""
    parser = harness.arguments(__doc__)
    parser.set_defaults(pairs=5, drop=())
    parser.add_argument("--share", type=float, default=0.1, help="of verdicts that are slow (default 0.1)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of a slow verdict (default 10)")
    parser.add_argument("--groups", type=int, default=64, help="per step (default 64)")
    parser.add_argument("--steps", type=int, default=75, help="measured (default 75)")
    parser.add_argument("--filling", type=int, default=25, help="steps before them (default 25)")
    parser.add_argument("--max-lag", type=int, default=24, help="of both arms (default 24)")
    parser.add_argument("--stale", default="wait", help="rule of both arms (default wait)")
    parser.add_argument("--concurrency", type=int, default=2048, help="verdicts at once (default 2048)")
    parser.add_argument("--default-concurrency", dest="drop", action="store_const", const=("concurrency",))
    given = parser.parse_args()
    harness.refuse_a_busy_machine(anyway=given.busy)
    where = harness.machine()
    first, last = given.filling, given.filling + given.steps
    seen: dict[str, Finished] = {}
    learner_time: dict[str, dict[str, float]] = {}
    numbers = iter(range(10_000))
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        tiny_model.build(root / "model")

        def arm(kind: str, share: float) -> float:
            slow = {SHARE: str(share), SECONDS: str(given.seconds)}
            os.environ.update(slow)
            with ray_cluster(environment={**ENVIRONMENT, **slow}):
                seen[kind] = execute(table(given), root=root, name=f"{kind}-{next(numbers)}")
            rows = seen[kind].metrics()  # while the directory is there
            learner_time[kind] = waits(rows, first=first, last=last)
            return steady(rows, first=first, last=last)

        found = harness.interleave(
            {"slow": lambda: arm("slow", given.share), "fast": lambda: arm("fast", 0.0)}, pairs=given.pairs, warm=0
        )
    fast_per_s = float(np.median(found["fast"]))
    rollouts_per_s = fast_per_s * given.groups * GROUP_SIZE
    details = {
        "steps_per_s": found,
        "rollouts_per_s_fast": rollouts_per_s,
        "needs": needs(rollouts_per_s=rollouts_per_s, steps_per_s=fast_per_s, share=given.share, seconds=given.seconds),
        "has": {"concurrency": "default" if given.drop else given.concurrency, "max_lag": given.max_lag},
        "stale": given.stale,
        "lag": {kind: each.result.get("lag") for kind, each in seen.items()},
        "waste": {kind: each.result.get("waste") for kind, each in seen.items()},
        "learner_time": learner_time,
        "limit": 1.0,
    }
    print(json.dumps(details, indent=1))
    found_ratio = harness.ratio(found["slow"], found["fast"])
    what = (
        f"steps/s with {given.share:.0%} of the verdicts taking {given.seconds:g} s / all fast, max_lag "
        f"{given.max_lag}, stale = {given.stale}"
    )
    if given.no_record:
        print(f"P14: {found_ratio}")
        return
    id = f"P14/{given.stale}" + ("-default-concurrency" if given.drop else "")
    harness.record([harness.row(id, what, found_ratio, target=(">=", TARGET), where=where, details=details)])


if __name__ == "__main__":
    main()
