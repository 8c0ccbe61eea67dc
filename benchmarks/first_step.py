"""From `millrace train` to the end of the first optimiser step, against the parts that nobody can leave out.

The parts, each in a process of its own that nothing runs beside: Ray's start, the generation engine's start (with
the imports of both), one batch generated, one optimiser step. The run is the command line's, with a held-out
evaluation; its first step has ended when the weights that it made are on the disk. Nothing of the run is running
before, in either arm; files are in the page cache, because the first round is not counted.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from benchmarks import harness
from benchmarks.sorting_run import sorting_run
from examples import tiny_model
from millrace.cluster import config as configs
from millrace.cluster import run_directory, snapshot
from millrace.cluster.job import Job
from millrace.cluster.plan import Plan, make_plan
from millrace.core.errors import MillraceError

TARGET = 1.3
LOOK_S = 0.01
DEADLINE_S = 120.0
GROUPS = 16
STEPS = 1000  # of the run, which is ended after its first


def milestones(directory: Path, began_s: float) -> dict[str, float]:
    """Seconds from the start to what a run leaves behind on its way to its first step."""
    found = {}
    files = {
        "checked": directory / run_directory.CONFIG,
        "learner published": next(iter((directory / "weights").glob("version_*0.json")), None),
    }
    for name, path in files.items():
        if path is not None and path.exists():
            found[name] = path.stat().st_mtime - began_s
    events = directory / run_directory.EVENTS
    for line in events.read_text().splitlines() if events.exists() else ():
        event = json.loads(line)
        found.setdefault(event["kind"], event["time_s"] - began_s)
    status = snapshot.read(directory)
    for name, each in (status.components if status is not None else {}).items():
        if each["state"] == "serving":
            found[f"{name} serves"] = each["since_s"] - began_s
    return {name: round(found[name], 2) for name in sorted(found, key=lambda name: found[name])}


def first_step(file: Path, directory: Path, settings: Sequence[str] = ()) -> tuple[float, dict[str, float]]:
    """Start the run of a file, end it after its first step. Returns its seconds, and milestones on the way."""
    command = [str(Path(sys.executable).with_name("millrace")), "train", str(file), *settings]
    began_s, began = time.time(), time.monotonic()
    process = subprocess.Popen(command, cwd=file.parent, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        while (at_s := made(directory)) is None:
            if process.poll() is not None or time.monotonic() - began > DEADLINE_S:
                raise RuntimeError(f"no first step after {time.monotonic() - began:.0f} s:\n{said(directory)}")
            time.sleep(LOOK_S)
        seconds = at_s - began_s
        time.sleep(1.5)  # for the driver to say who serves
        return seconds, milestones(directory, began_s)
    finally:
        with suppress(MillraceError):
            Job.attach(directory).stop(now=True)
        try:
            process.wait(timeout=30)
        finally:
            if process.poll() is None:
                process.kill()


def said(directory: Path) -> str:
    """The last lines of a run's logs."""
    logs = [directory / name for name in (run_directory.PROGRESS_LOG, run_directory.DRIVER_LOG)]
    return "\n".join(line for log in logs if log.exists() for line in log.read_text().splitlines()[-12:])


def made(directory: Path) -> float | None:
    """When the weights of the first step were whole on the disk, unix; None while there are none."""
    for path in (directory / "weights").glob("version_*.json"):
        if int(path.stem.removeprefix("version_")) == 1:
            return path.stat().st_mtime
    return None


@contextmanager
def started(module: str, *arguments: str) -> Iterator[tuple[IO[str], float]]:
    """A part in its own process: what it prints, and when it was started."""
    command = [sys.executable, "-m", f"benchmarks.cold.{module}", *arguments]
    began = time.monotonic()
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=harness.ROOT,
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        yield process.stdout, began
    finally:
        process.stdin.close()
        try:
            process.wait(timeout=30)
        finally:
            process.kill()


def until(lines: IO[str], word: str) -> float:
    """The moment in which a part prints this word."""
    for line in lines:
        if line.strip() == word:
            return time.monotonic()
    raise RuntimeError(f"a part ended before it was {word}")


def parts(model: Path, plan: Plan) -> dict[str, float]:
    """Seconds of each part."""
    with started("ray_start") as (lines, began):
        ray_s = until(lines, "ready") - began
    prompts = [prompt.tokens_P.tolist() for prompt in plan.prompts[:GROUPS]]
    given = {
        "options": {**plan.engine, "model": str(model)},
        "prompts": prompts,
        "group_size": plan.loop.group_size,
        "max_tokens": plan.sampling.max_tokens,
    }
    with started("engine", json.dumps(given)) as (lines, began):
        ready = until(lines, "ready")
        engine_s, generated_s = ready - began, until(lines, "generated") - ready
    with started("optimiser_step", str(model), str(GROUPS)) as (lines, began):
        ready = until(lines, "ready")
        step_s = until(lines, "stepped") - ready
    return {"ray": ray_s, "engine": engine_s, "generate a batch": generated_s, "optimiser step": step_s}


def main() -> None:
    """Measure."""
    parser = harness.arguments(__doc__)
    parser.set_defaults(pairs=5)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="of the run, as evaluation.every=5")
    given = parser.parse_args()
    harness.refuse_a_busy_machine(anyway=given.busy)
    where = harness.machine()
    seen: list[Mapping[str, float]] = []
    on_the_way: list[Mapping[str, float]] = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        tiny_model.build(root / "model")
        table: dict[str, Any] = sorting_run(steps=STEPS, groups_per_step=GROUPS)
        config = configs.of(table, root=root, source="benchmark", name="cold")
        configs.save(config, root / "cold.toml")
        plan = make_plan(config)
        runs = 0

        def run() -> float:
            nonlocal runs
            runs += 1
            seconds, found = first_step(root / "cold.toml", root / "runs" / f"cold-{runs}", settings(runs))
            on_the_way.append(found)
            return seconds

        def settings(number: int) -> list[str]:
            return [f"name=cold-{number}", *given.settings]

        def alone() -> float:
            seen.append(parts(root / "model", plan))
            return sum(seen[-1].values())

        found = harness.interleave({"run": run, "parts": alone}, pairs=given.pairs)
    details = {
        "pairs": given.pairs,
        "run_s": found["run"],
        "parts_s": found["parts"],
        "each_part_s": [{key: round(value, 2) for key, value in each.items()} for each in seen],
        "milestones_s": on_the_way,
        "limit": "1.0 where nothing overlaps",
    }
    what = "start to the end of the first optimiser step / (Ray start + engine load + one batch), cold"
    found_ratio = harness.ratio(found["run"], found["parts"])
    if given.settings:
        what += ", " + " ".join(given.settings)
    row = harness.row("P15/first-step", what, found_ratio, target=("<=", TARGET), where=where, details=details)
    print(json.dumps(details, indent=1))
    if given.no_record:
        print(f"P15: {found_ratio}")
    else:
        harness.record([row])


if __name__ == "__main__":
    main()
