"""Memory of a whole run: the sum over its processes of PSS (shared pages in equal shares), once a second, at its peak.

The run is `millrace train` as a user starts it, on Ray, with vLLM for generation and another vLLM for evaluation;
or, with --demo, the whole demo: warm start, and two such runs one after the other.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
import tomli_w

from benchmarks import harness
from benchmarks.sorting_run import sorting_run
from examples import tiny_model

EVERY_S = 1.0
DEADLINE_S, DEMO_DEADLINE_S = 170.0, 900.0
GIB = 2**30


def name_of(command: list[str]) -> str:
    """A short name of a process, by its command line.

    >>> name_of(["ray::GenerationWorker.run"]), name_of(["/a/ray/core/src/ray/gcs/gcs_server", "--x"])
    ('GenerationWorker', 'gcs_server')
    >>> name_of(["/a/python", "-u", "/b/ray/dashboard/agent.py"]), name_of(["python", "-m", "millrace", "train"])
    ('agent.py', 'millrace')
    """
    if not command:
        return "(ended)"
    if command[0].startswith("ray::"):
        return command[0].removeprefix("ray::").partition(".")[0].partition(" ")[0]
    if "-m" in command:
        return command[command.index("-m") + 1]
    scripts = [part for part in command[:4] if part.endswith(".py")]
    return Path((scripts or command)[0]).name


def snapshot(root: psutil.Process) -> dict[str, int]:
    """PSS of the tree below `root`, bytes, by "name pid"."""
    found: dict[str, int] = {}
    for process in [root, *root.children(recursive=True)]:
        try:
            name = f"{name_of(process.cmdline())} {process.pid}"
            found[name] = process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


def sharers(root: psutil.Process) -> int:
    """How many processes outside the tree map torch too: they take part of its pages off the sum."""
    tree = {root.pid, *(child.pid for child in root.children(recursive=True))}
    found = 0
    for process in psutil.process_iter():
        try:
            found += process.pid not in tree and any("libtorch_cpu" in each.path for each in process.memory_maps())
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


def grouped(processes: Mapping[str, int]) -> dict[str, tuple[int, float]]:
    """Name -> how many processes, and their GiB together; largest first.

    >>> grouped({"idle 1": 2**30, "idle 2": 2**29, "queue 3": 2**31})
    {'queue': (1, 2.0), 'idle': (2, 1.5)}
    """
    sums: dict[str, list[int]] = defaultdict(list)
    for name, size in processes.items():
        sums[name.rpartition(" ")[0]].append(size)
    largest = sorted(sums.items(), key=lambda item: -sum(item[1]))
    return {name: (len(sizes), round(sum(sizes) / GIB, 3)) for name, sizes in largest}


def run_file(directory: Path, *, steps: int) -> Path:
    """The run: the demo's task, sizes and engines."""
    tiny_model.build(directory / "model")
    table = sorting_run(steps=steps, groups_per_step=16)
    path = directory / "memory.toml"
    path.write_text(tomli_w.dumps(table))
    return path


def watch(arguments: Sequence[str], log: Path, *, deadline_s: float) -> tuple[dict[str, int], list[float], int]:
    """Run `python -m ...`; returns the processes at the peak, the sum at every sample in GiB, and `sharers`."""
    with log.open("w") as output:
        run = subprocess.Popen([sys.executable, "-m", *arguments], cwd=harness.ROOT, stdout=output, stderr=output)
        root = psutil.Process(run.pid)
        peak: dict[str, int] = {}
        sums: list[float] = []
        others = 0
        began = time.monotonic()
        try:
            while run.poll() is None:
                if time.monotonic() - began > deadline_s:
                    raise TimeoutError(f"the run did not end within {deadline_s:g} s: {log.read_text()[-2000:]}")
                try:
                    now = snapshot(root)
                except psutil.NoSuchProcess:
                    break
                sums.append(sum(now.values()) / GIB)
                if sum(now.values()) > sum(peak.values()):
                    peak = now
                if len(sums) == 10:
                    others = sharers(root)
                time.sleep(EVERY_S)
        finally:
            if run.poll() is None:
                run.terminate()
            run.wait(timeout=60)
    if run.returncode:
        raise RuntimeError(f"the run ended with status {run.returncode}: {log.read_text()[-2000:]}")
    return peak, sums, others


def main() -> None:
    """Watch one run."""
    parser = harness.arguments(__doc__)
    parser.add_argument("--steps", type=int, default=120, help="of the run (default 120)")
    parser.add_argument("--demo", action="store_true", help="watch `python -m examples.demo` (about 4 minutes)")
    given = parser.parse_args()
    harness.refuse_a_busy_machine(anyway=given.busy)
    where = harness.machine()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        if given.demo:
            peak, sums, others = watch(["examples.demo"], directory / "log", deadline_s=DEMO_DEADLINE_S)
        else:
            path = str(run_file(directory, steps=given.steps))
            peak, sums, others = watch(["millrace", "train", path], directory / "log", deadline_s=DEADLINE_S)
    table = grouped(peak)
    for process, (many, size_gib) in table.items():
        print(f"  {size_gib:6.2f} GiB  {many} x {process}")
    details = {
        "samples": len(sums),
        "last_gib": sums[-2] if len(sums) > 1 else sums[-1],
        "processes_at_peak_gib": {process: size_gib for process, (_, size_gib) in table.items()},
        "how_many": {process: many for process, (many, _) in table.items()},
        "other_processes_that_share_torch": others,
        "steps": None if given.demo else given.steps,
        "limit": "two imports of vLLM and torch, one of torch, and Ray's own processes",
    }
    run = "the demo" if given.demo else "`millrace train` on Ray with vLLM generation and evaluation"
    what = f"largest sum of PSS of {run}, GiB"
    rows = [
        harness.row(
            "memory-pss-demo" if given.demo else "memory-pss",
            what,
            max(sums),
            target=("<=", 8.0),
            where=where,
            details=details,
        )
    ]
    if given.no_record:
        print(f"  {max(sums):.2f} GiB")
    else:
        harness.record(rows)


if __name__ == "__main__":
    main()
