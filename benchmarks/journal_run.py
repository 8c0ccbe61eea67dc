"""Steps per second of a whole run with the journal on disk, over the same run with it in memory."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import asyncio
import json
import tempfile
from pathlib import Path

from benchmarks import harness
from benchmarks.sorting_run import sorting_run
from examples import tiny_model
from millrace.cluster import config as configs
from millrace.cluster.plan import make_plan
from millrace.cluster.run import Run
from millrace.cluster.runtime import ray_cluster
from millrace.cluster.spawn import OnRay

SKIPPED = 5  # first steps, which wait for engines and caches


def steps_per_s(directory: Path, *, on_disk: bool, steps: int, number: int) -> float:
    """Of one run on Ray and vLLM, without its start and its first steps."""
    table = sorting_run(steps=steps, groups_per_step=16)
    del table["data"]["held_out"], table["evaluation"]
    table["journal"] = {"on_disk": on_disk}
    table["model"] = str(directory / "model")
    config = configs.of(table, root=directory, source="benchmark", name=f"run-{number}")
    config.directory.mkdir(parents=True)
    spawn = OnRay()
    try:
        asyncio.run(Run(make_plan(config), spawn=spawn, resume=False, say=lambda line: None).execute())
    finally:
        spawn.kill()
    rows = [json.loads(line) for line in (config.directory / "metrics.jsonl").read_text().splitlines()]
    spent = [row["time/step_s"] for row in rows if "time/step_s" in row][SKIPPED:]
    return len(spent) / sum(spent)


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
