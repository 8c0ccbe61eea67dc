"""What every process of a run does under load: CPU seconds, the functions they go to, Ray calls and their bytes.

The run is the sorting task on Ray and vLLM. Once it has made its first steps it is watched twice: without a profiler,
for the CPU seconds of every process; then with py-spy on each Python process of ours, for the functions. Then it is
stopped. py-spy is found on PATH; `pip install py-spy` into any environment brings it.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import asyncio
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks import harness
from benchmarks.ray_calls import CountingOnRay
from benchmarks.sorting_run import sorting_run
from examples import tiny_model
from millrace.cluster import config as configs
from millrace.cluster import snapshot
from millrace.cluster.plan import make_plan
from millrace.cluster.run import Run
from millrace.cluster.runtime import ray_cluster

ENDLESS = 100_000  # steps: the run is stopped
RATE = 50  # samples per second and process
DRIVER = "driver"
TOP = 12


@dataclass(frozen=True, slots=True)
class Watched:
    """One window of a run."""

    seconds: float
    steps: int
    rollouts: int
    cpu_s: Mapping[str, float]  # by process


@dataclass(frozen=True, slots=True)
class Functions:
    """Where one process's samples were taken."""

    samples: int
    own: Counter[str]  # samples with this function innermost
    within: Counter[str]  # samples with this function anywhere on the stack


def functions(lines: Iterable[str]) -> Functions:
    """Of collapsed stacks, `outermost;...;innermost count`.

    >>> functions(["a;b 3", "a;c;a 1"]).within.most_common()
    [('a', 4), ('b', 3), ('c', 1)]
    """
    own: Counter[str] = Counter()
    within: Counter[str] = Counter()
    samples = 0
    for line in lines:
        stack, _, many = line.strip().rpartition(" ")
        if not stack:
            continue
        frames = [_short(frame) for frame in stack.split(";")]
        samples += int(many)
        own[frames[-1]] += int(many)
        for frame in set(frames):
            within[frame] += int(many)
    return Functions(samples, own, within)


def _short(frame: str) -> str:
    """`function (path/to/file.py:12)` -> `function (to/file.py)`: lines of one function belong together."""
    name, _, place = frame.partition(" (")
    path = place.rstrip(")").rpartition(":")[0] or place.rstrip(")")
    return f"{name} ({'/'.join(Path(path).parts[-2:])})" if place else name


def cpu_table(before: Mapping[int, tuple[str, float]], after: Mapping[int, tuple[str, float]]) -> dict[str, float]:
    """CPU seconds between two looks, by name; processes of one name are added up.

    >>> cpu_table({1: ("a", 1.0)}, {1: ("a", 2.5), 2: ("b", 0.5), 3: ("a", 1.0)})
    {'a': 2.5, 'b': 0.5}
    """
    spent: Counter[str] = Counter()
    for pid, (name, total_s) in after.items():
        spent[name] += total_s - before.get(pid, (name, 0.0))[1]  # type: ignore[assignment]  # Counter's stub is of int
    return {name: float(total) for name, total in spent.most_common()}


def processes(names: Mapping[int, str]) -> dict[int, tuple[str, float]]:
    """This process and all below it: name and CPU seconds so far; `names` are those of our components."""
    found = {}
    this = psutil.Process()
    for each in (this, *this.children(recursive=True)):
        with suppress(psutil.Error):
            times = each.cpu_times()
            named = names.get(each.pid) or ("py-spy" if "py-spy" in each.name() else f"ray: {each.name()[:24]}")
            found[each.pid] = (named, times.user + times.system)
    return found


def window(directory: Path, names: Mapping[int, str], seconds: float, rollouts_per_step: int) -> Watched:
    """Let the run go on for so long."""
    first, before, began = _step(directory), processes(names), time.monotonic()
    time.sleep(seconds)
    after, took_s = processes(names), time.monotonic() - began
    steps = _step(directory) - first
    return Watched(took_s, steps, steps * rollouts_per_step, cpu_table(before, after))


def _step(directory: Path) -> int:
    status = snapshot.read(directory)
    return 0 if status is None else status.step


def spied(names: Mapping[int, str], seconds: float, into: Path) -> dict[str, Functions]:
    """Sample the processes for so long, all at once."""
    py_spy = shutil.which("py-spy")
    assert py_spy is not None
    started = {}
    for pid, name in names.items():
        path = into / f"{name}.txt"
        command = [py_spy, "record", "--pid", str(pid), "--duration", str(int(seconds)), "--rate", str(RATE)]
        command += ["--format", "raw", "--nonblocking", "--output", str(path)]
        started[name] = (path, subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
    for _, process in started.values():
        process.wait(timeout=seconds + 60)
    return {
        name: functions(path.read_text().splitlines() if path.exists() else ()) for name, (path, _) in started.items()
    }


def watched(
    directory: Path, *, skipped: int, seconds: float, rollouts_per_step: int
) -> tuple[Watched, dict[str, Functions]]:
    """Both windows, after the run's first steps."""
    while _step(directory) < skipped:
        time.sleep(0.5)
    status = snapshot.read(directory)
    assert status is not None
    names = {each["pid"]: name for name, each in status.components.items()} | {os.getpid(): DRIVER}
    plain = window(directory, names, seconds, rollouts_per_step)
    return plain, spied(names, seconds, directory)


async def profiled(
    config: configs.RunConfig, spawn: CountingOnRay, *, skipped: int, seconds: float
) -> tuple[Watched, dict[str, Functions], list[dict[str, object]]]:
    """Run until it was watched. Returns what was seen, and the calls."""
    run = Run(make_plan(config), spawn=spawn, resume=False, say=lambda line: print(f"  {line}", flush=True))
    running = asyncio.create_task(run.execute())
    rollouts = config.loop.groups_per_step * config.loop.group_size
    watching = asyncio.create_task(
        asyncio.to_thread(watched, config.directory, skipped=skipped, seconds=seconds, rollouts_per_step=rollouts)
    )
    await asyncio.wait({running, watching}, return_when=asyncio.FIRST_COMPLETED)
    if running.done():
        running.result()
    plain, stacks = await watching
    trained = _step(config.directory) * rollouts
    calls, sizes = await spawn.calls(), await spawn.bytes()
    await run.stop()
    await running
    return plain, stacks, call_table(calls, sizes, trained)


def call_table(
    calls: Mapping[str, Mapping[str, int]], sizes: Mapping[str, Mapping[str, tuple[int, int]]], trained: int
) -> list[dict[str, object]]:
    """A row per actor and method, the most frequent first.

    >>> call_table({"queue": {"take": 4}}, {"queue": {"take": (10, 80)}}, 8)
    [{'method': 'queue.take', 'calls': 4, 'calls_per_rollout': 0.5, 'bytes_per_call': 22.5, 'bytes_per_rollout': 11.25}]
    """
    rows = [
        (many, sum(sizes[actor][method]), f"{actor}.{method}")
        for actor, methods in calls.items()
        for method, many in methods.items()
    ]
    return [
        {
            "method": name,
            "calls": many,
            "calls_per_rollout": many / trained,
            "bytes_per_call": size / many,
            "bytes_per_rollout": size / trained,
        }
        for many, size, name in sorted(rows, reverse=True)
    ]


def shown(plain: Watched, stacks: Mapping[str, Functions], calls: Iterable[Mapping[str, Any]]) -> str:
    """The tables."""
    cores = os.cpu_count() or 1
    total = sum(plain.cpu_s.values())
    lines = [
        f"{plain.steps} steps, {plain.rollouts / plain.seconds:.0f} rollouts/s; {total / plain.seconds:.2f} of {cores} "
        f"cores busy, {1e3 * total / max(1, plain.rollouts):.2f} ms of CPU per trained rollout",
        "",
        f"{'process':<28}{'cores':>8}{'share':>8}",
    ]
    for name, spent_s in plain.cpu_s.items():
        if spent_s > 0.001 * total:
            lines.append(f"{name:<28}{spent_s / plain.seconds:>8.3f}{spent_s / total:>8.1%}")
    for name, found in stacks.items():
        lines += ["", f"{name}: {found.samples} samples; innermost function, and functions it is within"]
        inner, outer = found.own.most_common(TOP), found.within.most_common(3 * TOP)
        lines += [f"  {many / found.samples:>6.1%} {function}" for function, many in inner]
        lines += [f"    {many / found.samples:>6.1%} within {function}" for function, many in outer]
    lines += ["", f"{'calls':<36}{'many':>8}{'/rollout':>10}{'B/call':>10}{'B/rollout':>11}"]
    lines += [
        f"{row['method']:<36}{row['calls']:>8}{row['calls_per_rollout']:>10.4f}{row['bytes_per_call']:>10.0f}"
        f"{row['bytes_per_rollout']:>11.1f}"
        for row in calls
    ]
    return "\n".join(lines)


def main() -> None:
    """Profile one run and print it; nothing is recorded as a row."""
    parser = harness.arguments(__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each of the two windows (default 20)")
    parser.add_argument("--skipped", type=int, default=15, help="steps before the first window (default 15)")
    parser.add_argument("--groups", type=int, default=16, help="per step, of 8 rollouts each (default 16)")
    parser.add_argument("--output", type=Path, help="file for the tables, beside printing them")
    given = parser.parse_args()
    if shutil.which("py-spy") is None:
        sys.exit("py-spy is not on PATH: pip install py-spy into any environment, and put its bin directory there")
    harness.refuse_a_busy_machine(anyway=given.busy)
    print(harness.machine())
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        tiny_model.build(directory / "model")
        table = sorting_run(steps=ENDLESS, groups_per_step=given.groups)
        table["evaluation"]["every"] = 20
        table["data"]["held_out_limit"] = 50
        config = configs.of(table, root=directory, source="benchmark", name="profile")
        config.directory.mkdir(parents=True)
        with ray_cluster():
            spawn = CountingOnRay()
            try:
                found = asyncio.run(profiled(config, spawn, skipped=given.skipped, seconds=given.seconds))
            finally:
                spawn.kill()
    text = shown(*found)
    print(text)
    if given.output:
        given.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
