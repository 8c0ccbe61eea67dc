"""What every benchmark shares: who measured, arms interleaved in pairs, intervals, and rows of results.

A figure is the ratio of two arms that alternate A B A B ... in one run: the machine's noise hits both alike. It is
the median over the pairs, with the bootstrap's 95 % interval of that median.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CODE = ("core", "actors", "rewards", "learner", "cluster", "recipes", "examples", "benchmarks/*.py")
RESAMPLES = 10_000

Target = tuple[Literal[">=", "<="], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One figure."""

    id: str
    what: str
    value: float
    interval: tuple[float, float] | None  # 95 %, of the median; None for counts
    target: str  # as ">= 0.9"; "" where none is set
    reached: bool | None  # None where no target is set
    commit: str
    machine: str
    date: str
    command: str
    details: Mapping[str, object]


def machine() -> str:
    """Processor, cores, memory and load."""
    load = ", ".join(f"{value:.2f}" for value in os.getloadavg())
    memory_gib = psutil.virtual_memory().total / 2**30
    return f"{processor()}, {os.cpu_count()} cores, {memory_gib:.0f} GiB, load {load}"


def processor() -> str:
    """The processor's name, with its family and model where the name says little."""
    facts: dict[str, str] = {}
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    name = facts.get("model name", platform.processor() or platform.machine())
    return f"{name} (family {facts['cpu family']}, model {facts['model']})" if "cpu family" in facts else name


def commit() -> str:
    """The checked-out commit; "+" when the code differs from it."""

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", *arguments]
        try:
            return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
        except FileNotFoundError:  # a machine without git
            return ""

    changed = git("status", "--porcelain", "--", *CODE)
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + ("+" if changed else "")


def refuse_a_busy_machine(*, anyway: bool) -> None:
    """End the script when more threads want to run than there are cores."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > cores and not anyway:
        sys.exit(f"load {load:.1f} on {cores} cores: wait until the machine is free, or measure --busy all the same")


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=7, help="of arms, interleaved")
    parser.add_argument("--busy", action="store_true", help="measure although the machine has other work")
    parser.add_argument("--no-record", action="store_true", help="print, and write nothing into results/")
    return parser


def interleave(
    arms: Mapping[str, Callable[[], float]], *, pairs: int, warm: int = 1, say: Callable[[str], None] = print
) -> dict[str, list[float]]:
    """Run the arms in turn, `warm` rounds unmeasured and `pairs` measured.

    >>> interleave({"a": lambda: 1.0, "b": lambda: 2.0}, pairs=2, say=lambda line: None)
    {'a': [1.0, 1.0], 'b': [2.0, 2.0]}
    """
    found: dict[str, list[float]] = {name: [] for name in arms}
    for round_ in range(-warm, pairs):
        values = {name: arm() for name, arm in arms.items()}
        if round_ >= 0:
            for name, value in values.items():
                found[name].append(value)
        label = f"round {round_ + 1}" if round_ >= 0 else "warm-up"
        say(f"  {label}: " + ", ".join(f"{name} {value:,.4g}" for name, value in values.items()))
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """Of two arms."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def ratio(above: Sequence[float], below: Sequence[float]) -> Ratio:
    """Median of the pairs' ratios, and its bootstrap 95 % interval (percentile method, Efron 1979).

    >>> print(ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]))
    2.000 [2.000, 2.000]
    """
    if len(above) != len(below) or not len(above):
        raise ValueError(f"{len(above)} and {len(below)} measurements are no pairs")
    ratio_P = np.asarray(above, float) / np.asarray(below, float)
    drawn = np.random.default_rng(0).integers(len(ratio_P), size=(RESAMPLES, len(ratio_P)))
    low, high = np.quantile(np.median(ratio_P[drawn], axis=1), [0.025, 0.975])
    return Ratio(median=float(np.median(ratio_P)), low=float(low), high=float(high))


def row(
    id: str,
    what: str,
    value: float | Ratio,
    *,
    target: Target | None,
    where: str,
    details: Mapping[str, object],
) -> Row:
    """A figure, with who measured it.

    Args:
        target: the relation that it should have, and to what.
        where: `machine()` as it was before the arms ran, whose own load is not to be reported.
    """
    measured = value.median if isinstance(value, Ratio) else float(value)
    reached = None
    if target is not None:
        reached = measured >= target[1] if target[0] == ">=" else measured <= target[1]
    return Row(
        id=id,
        what=what,
        value=measured,
        interval=(value.low, value.high) if isinstance(value, Ratio) else None,
        target=f"{target[0]} {target[1]:g}" if target else "",
        reached=reached,
        commit=commit(),
        machine=where,
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        command=" ".join(["python -m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        details=details,
    )


def record(rows: Sequence[Row], path: Path | None = None, *, say: Callable[[str], None] = print) -> None:
    """Print the rows, and put them into the script's own file in results/ in the place of those with the same id."""
    path = path or RESULTS / f"{Path(sys.argv[0]).stem}.json"
    for each in rows:
        verdict = {True: "reached", False: "MISSED", None: ""}[each.reached]
        interval = f" [{each.interval[0]:.3f}, {each.interval[1]:.3f}]" if each.interval else ""
        say(f"{each.id}: {each.value:.4g}{interval}  {each.what}  {each.target} {verdict}".rstrip())
    known = {each["id"]: each for each in (json.loads(path.read_text()) if path.exists() else ())}
    known |= {each.id: asdict(each) for each in rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(list(known.values()), indent=1) + "\n")
