"""Steps per second of a whole run with the journal on disk, over the same run with it in memory."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import tempfile
from pathlib import Path

from benchmarks import harness, runs
from benchmarks.sorting_run import sorting_run
from examples import tiny_model
from millrace.cluster.runtime import ray_cluster

SKIPPED = 5  # first steps, which wait for engines and caches


def steps_per_s(directory: Path, *, on_disk: bool, steps: int, number: int) -> float:
    """Of one run on Ray and vLLM, without its start and its first steps."""
    table = sorting_run(steps=steps, groups_per_step=16)
    del table["data"]["held_out"], table["evaluation"]
    table["journal"] = {"on_disk": on_disk}
    return runs.execute(table, root=directory, name=f"run-{number}").steps_per_s(SKIPPED)


def main() -> None:
    """Interleave both."""
    parser = harness.arguments(__doc__)
    parser.add_argument("--steps", type=int, default=80)
    given = parser.parse_args()
    harness.refuse_a_busy_machine(anyway=given.busy)
    where = harness.machine()
    numbers = iter(range(10_000))
    with tempfile.TemporaryDirectory() as name, ray_cluster():
        directory = Path(name)
        tiny_model.build(directory / "model")

        def arm(on_disk: bool) -> float:
            return steps_per_s(directory, on_disk=on_disk, steps=given.steps, number=next(numbers))

        arms = {"disk": lambda: arm(True), "memory": lambda: arm(False)}
        found = harness.interleave(arms, pairs=given.pairs, warm=0)
    ratio = harness.ratio(found["disk"], found["memory"])
    what = "steps/s of a run with the journal on disk / in memory"
    rows = [harness.row("journal-run", what, ratio, target=(">=", 0.97), where=where, details={"steps_per_s": found})]
    if given.no_record:
        print(f"{ratio}")
    else:
        harness.record(rows)


if __name__ == "__main__":
    main()
