"""Asynchronous over synchronous steps per second of whole runs, as a share of the loop's own limit.

The same run on Ray with vLLM, once with max_lag = 0 and once with max_lag = 4 under each stale rule. Engine and
learner are pinned to a core each, everything else runs where the system puts it. Response lengths are flat, or
heavy-tailed with a 99th percentile of ten medians: the policy's own weights make them so (benchmarks/length_model.py),
and its learning rate is so small that they stay so.

The limit is that of a simulation (benchmarks/replay_loop.py) of the same rules on the recorded lengths, with what
every stage takes alone on one core (benchmarks/stage_times.py), measured in each round. From the same runs: what the
learner's waiting goes on, and what was generated for nothing.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import harness, length_model, runs, stage_times
from benchmarks.length_model import KINDS, Lengths
from benchmarks.replay_loop import LengthsOf, Simulated, StageTimes, simulate
from millrace.cluster.process import Component, found
from millrace.cluster.runtime import ray_cluster
from millrace.cluster.spawn import OnRay
from millrace.core.replay.config import QueueConfig
from millrace.core.types import GroupId

GROUPS_PER_STEP, GROUP_SIZE, SLOTS, MAX_LAG = 8, 8, 64, 4
RULES = ("wait", "mask", "train", "drop", "requeue")
STEPS = 24
SKIPPED = 6  # first steps, which wait for engines and caches and fill the loop
SLICE = range(SKIPPED, SKIPPED + 8)  # of steps, whose batches are measured alone
CORES: runs.Cores = {"generation": {0}, "learner": {1}}
SYNC, BOTH, RECORDED = "sync", "sync both cores", "recorded"
NEVER_TRAINED = ("stale", "failed", "in_flight", "queued", "unaccounted")  # of the waste ledger


class OnBothCores(OnRay):
    """Spawns engines that compute with two threads, pinned nowhere."""

    def __call__(self, component: Component, *args: Any, name: str, **kwargs: Any) -> Any:
        return super().__call__(
            threaded(found(component)) if name.startswith("generation") else component, *args, name=name, **kwargs
        )


def threaded(cls: type) -> type:
    """The class, whose process computes with a thread per core from its construction on."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        torch.set_num_threads(os.cpu_count() or 1)
        cls.__init__(self, *args, **kwargs)  # type: ignore[misc]  # of the class that is threaded

    return type(cls.__name__, (cls,), {"__init__": __init__})


def loop(arm: str) -> dict[str, Any]:
    """The run's section of that name."""
    sizes = {"steps": STEPS, "groups_per_step": GROUPS_PER_STEP, "group_size": GROUP_SIZE}
    if arm not in RULES:
        return {**sizes, "max_lag": 0}
    return {**sizes, "max_lag": MAX_LAG, "stale": arm, **({"requeues": 1} if arm == "requeue" else {})}


def table(arm: str, lengths: Lengths, passes: int = 1) -> dict[str, Any]:
    """A run's configuration as in its TOML file; model and data are expected beside it.

    Args:
        passes: of the learner over a batch: more of them bring a faster learner to the engine's pace.
    """
    return {
        "model": "model",
        "recipe": {"name": "grpo", "updates": {"epochs": passes}},
        "data": {"train": "rows.jsonl"},
        "rewards": {"verifier": "position_match"},
        "loop": loop(arm),
        "sampling": {"max_tokens": lengths.limit},
        "generation": {"slots": SLOTS},
        "learner": {"learning_rate": 1e-9, "threads": 2 if arm == BOTH else 1, "checkpoint_every": 10_000},
    }


@dataclass(slots=True)
class Found:
    """Of all rounds, by arm."""

    steps_per_s: dict[str, list[float]] = field(default_factory=dict)
    limits: dict[str, list[float]] = field(default_factory=dict)  # steps/s of the simulation
    last: dict[str, runs.Finished] = field(default_factory=dict)
    idle: dict[str, list[dict[str, float]]] = field(default_factory=dict)  # shares of the learner's time
    idle_limits: dict[str, list[float]] = field(default_factory=dict)
    waste: dict[str, list[dict[str, int]]] = field(default_factory=dict)
    beyond: dict[str, int] = field(default_factory=dict)  # rollouts trained beyond max_lag
    masked_limits: dict[str, float] = field(default_factory=dict)  # shares of the generated tokens
    times: list[dict[str, float]] = field(default_factory=list)
    fits: list[Mapping[str, Any]] = field(default_factory=list)

    def add(self, arm: str, run: runs.Finished) -> None:
        self.steps_per_s.setdefault(arm, []).append(run.steps_per_s(SKIPPED))
        self.idle.setdefault(arm, []).append(idle_shares(run.metrics()[SKIPPED:]))
        self.waste.setdefault(arm, []).append(dict(run.result["waste"]))
        self.beyond[arm] = self.beyond.get(arm, 0) + beyond(run.result)
        self.last[arm] = run

    def add_limit(self, arm: str, simulated: Simulated) -> None:
        self.limits.setdefault(arm, []).append(simulated.steps_per_s(SKIPPED))
        self.idle_limits.setdefault(arm, []).append(simulated.idle(SKIPPED))
        self.masked_limits[arm] = simulated.tokens["masked"] / simulated.tokens["generated"]


def idle_shares(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What the learner's time went on in these steps: waiting by cause, and what no cause explains.

    >>> idle_shares([{"time/step_s": 2.0, "time/other_s": 0.5, "idle/data_s": 1.0}])["data"]
    0.5
    """
    total_s = sum(row["time/step_s"] for row in rows)
    columns = {cause: f"idle/{cause}_s" for cause in ("data", "judge", "weights", "scheduler")} | {
        "other": "time/other_s"
    }
    return {name: sum(row.get(column, 0.0) for row in rows) / total_s for name, column in columns.items()}


def beyond(result: Mapping[str, Any]) -> int:
    """Trained rollouts older than max_lag.

    >>> beyond({"max_lag": 2, "lag_histogram": {"0": 3, "2": 5, "3": 1}})
    1
    """
    return sum(many for lag, many in result["lag_histogram"].items() if int(lag) > result["max_lag"])


def never_trained(waste: Mapping[str, int]) -> float:
    """The share of the generated tokens that was neither trained, masked nor left out by a filter of the recipe's.

    >>> never_trained({"generated": 10, "trained": 7, "masked": 1, "stale:drop": 1, "in_flight": 1, "filtered:x": 0})
    0.2
    """
    lost = sum(many for row, many in waste.items() if row.partition(":")[0] in NEVER_TRAINED)
    return lost / max(1, waste["generated"])


def recorded(lengths: Mapping[GroupId, Sequence[int]]) -> LengthsOf:
    """Those of the trace; what was not drawn in it is like a group that was, chosen at random."""
    groups = sorted(lengths)

    @cache
    def of(group: GroupId) -> Sequence[int]:
        return lengths.get(group) or lengths[random.Random(f"{group}").choice(groups)]

    return of


def rounds(kind: str, rules: Sequence[str], *, pairs: int, root: Path, both: bool, passes: int) -> Found:
    """Whole runs of every arm in turn, and the limits by each round's own stage times."""
    lengths, numbers, found = KINDS[kind], count(), Found()
    length_model.build(root / "model", lengths)
    length_model.write_rows(root / "rows.jsonl")

    def run(arm: str) -> runs.Finished:
        spawn = OnBothCores() if arm == BOTH else runs.PinnedOnRay(CORES)
        name = f"{kind}-{arm.replace(' ', '-')}-{next(numbers)}"
        return runs.execute(table(arm, lengths, passes), root=root, name=name, spawn=spawn)

    def measured(arm: str) -> Callable[[], float]:
        def once() -> float:
            found.add(arm, run(arm))
            return found.steps_per_s[arm][-1]

        return once

    with ray_cluster(), ExitStack() as stack:
        trace = run(SYNC)
        rows = stage_times.rows_of(trace.directory)
        of = recorded(stage_times.lengths_of(rows))
        one = stack.enter_context(stage_times.process(trace.directory, table(SYNC, lengths, passes), SLICE, [1]))

        def limit() -> float:
            times, fit = one()
            found.times.append(asdict(times))
            found.fits.append(fit)
            for arm in (SYNC, *rules):
                found.add_limit(arm, limit_of(arm, times, of))
            return found.limits[rules[0]][-1] / found.limits[SYNC][-1]

        arms = {"limit": limit, **{arm: measured(arm) for arm in (SYNC, *rules, *([BOTH] if both else []))}}
        harness.interleave(arms, pairs=pairs, warm=0)
    return found


def limit_of(arm: str, times: StageTimes, of: LengthsOf) -> Simulated:
    """The arm's run, simulated."""
    return simulate(QueueConfig(**loop(arm)), times, of, slots=SLOTS, prompt_tokens=4)


def rows_of(kind: str, rules: Sequence[str], found: Found, where: str, passes: int = 1) -> list[harness.Row]:
    """P8 for every rule; P9 and P11 where they are asked for. P9 alone of a learner that makes several passes."""
    if passes > 1:
        return [row for rule in set(rules) & {"wait", "train"} for row in _idle(kind, rule, found, where, passes)]
    rows = [_share(kind, rule, found, where) for rule in rules]
    if BOTH in found.steps_per_s:
        ratio = harness.ratio(found.steps_per_s["wait"], found.steps_per_s[BOTH])
        what = f"asynchronous (wait), a core each / synchronous with both cores, steps/s, {kind} lengths"
        details: dict[str, object] = {"steps_per_s": {arm: found.steps_per_s[arm] for arm in ("wait", BOTH, SYNC)}}
        rows.append(harness.row(f"P8/{kind}/wait-both-cores", what, ratio, target=None, where=where, details=details))
    for rule in set(rules) & {"wait", "mask"}:
        rows += _waste(kind, rule, found, where)
    for rule in set(rules) & {"wait", "train"}:
        rows += _idle(kind, rule, found, where)
    return sorted(rows, key=lambda row: row.id)


def _share(kind: str, rule: str, found: Found, where: str) -> harness.Row:
    speed, limits = found.steps_per_s, found.limits
    made, possible = harness.ratio(speed[rule], speed[SYNC]), harness.ratio(limits[rule], limits[SYNC])
    shares = [a / b for a, b in zip(speed[rule], speed[SYNC], strict=True)]
    of = [a / b for a, b in zip(limits[rule], limits[SYNC], strict=True)]
    details: dict[str, object] = {
        "steps_per_s": {arm: speed[arm] for arm in (SYNC, rule)},
        "limit_steps_per_s": {arm: limits[arm] for arm in (SYNC, rule)},
        "async_over_sync": str(made),
        "limit": str(possible),
        "share_of_own_limit": {arm: str(harness.ratio(speed[arm], limits[arm])) for arm in (SYNC, rule)},
        "stage_times_s": found.times,
        "fits": found.fits,
        "lengths": asdict(KINDS[kind]) | {"median": KINDS[kind].quantile(0.5), "p99": KINDS[kind].quantile(0.99)},
        "sizes": {**loop(rule), "slots": SLOTS, "skipped": SKIPPED},
    }
    what = f"asynchronous ({rule}) / synchronous steps/s, {kind} lengths, as a share of its limit"
    return harness.row(
        f"P8/{kind}/{rule}", what, harness.ratio(shares, of), target=(">=", 0.9), where=where, details=details
    )


def _idle(kind: str, rule: str, found: Found, where: str, passes: int = 1) -> list[harness.Row]:
    by_cause = {name: float(np.median([each[name] for each in found.idle[rule]])) for name in found.idle[rule][0]}
    waits = float(np.median([sum(each.values()) - each["other"] for each in found.idle[rule]]))
    details: dict[str, object] = {
        "by_cause": by_cause,
        "runs": found.idle[rule],
        "limit": float(np.median(found.idle_limits[rule])),
        "stage_times_s": found.times,
    }
    what = f"{{}} of the learner at max_lag {MAX_LAG} ({rule}), {kind} lengths"
    what += f", {passes} passes over a batch" if passes > 1 else ""
    key = f"P9/{kind}/{rule}" + (f"-{passes}-passes" if passes > 1 else "")
    facts: dict[str, Any] = {"where": where, "details": details}
    return [
        harness.row(key, what.format("idle share"), waits, target=("<=", 0.05), **facts),
        harness.row(f"{key}-other", what.format("unexplained share"), by_cause["other"], target=("<=", 0.02), **facts),
    ]


def _waste(kind: str, rule: str, found: Found, where: str) -> list[harness.Row]:
    details: dict[str, object] = {"waste": found.waste[rule], "rollouts_beyond_max_lag": found.beyond[rule]}
    facts: dict[str, Any] = {"where": where, "details": details}
    lost = max(map(never_trained, found.waste[rule]))
    tokens = f"generated tokens that were never trained ({rule}), {kind} lengths"
    rows = [harness.row(f"P11/{kind}/{rule}", tokens, lost, target=("<=", 0.02), **facts)]
    if rule == "wait":
        what = f"rollouts trained beyond max_lag ({rule}), {kind} lengths"
        rows.append(harness.row(f"P11/{kind}/{rule}-beyond", what, found.beyond[rule], target=("<=", 0), **facts))
    else:
        details["masked_share_of_the_limit"] = found.masked_limits[rule]
        shares = [each["masked"] / each["generated"] for each in found.waste[rule]]
        what = f"generated tokens that were masked, {kind} lengths"
        rows.append(harness.row(f"P11/{kind}/{rule}-masked", what, float(np.median(shares)), target=None, **facts))
    return rows


def main() -> None:
    """Measure one kind of lengths, and as many rules as are named."""
    parser = harness.arguments(__doc__)
    parser.set_defaults(pairs=5)
    parser.add_argument("--lengths", choices=sorted(KINDS), action="append", help="all, if none is named")
    parser.add_argument("--rule", choices=RULES, action="append", help="all, if none is named")
    parser.add_argument("--passes", type=int, default=1, help="of the learner over a batch (default 1)")
    parser.add_argument("--no-both-cores", action="store_true", help="leave out the synchronous arm on both cores")
    given = parser.parse_args()
    harness.refuse_a_busy_machine(anyway=given.busy)
    where = harness.machine()
    rules = tuple(given.rule or RULES)
    for kind in given.lengths or sorted(KINDS):
        with tempfile.TemporaryDirectory() as name:
            both = "wait" in rules and not given.no_both_cores and given.passes == 1
            found = rounds(kind, rules, pairs=given.pairs, root=Path(name), both=both, passes=given.passes)
        rows = rows_of(kind, rules, found, where, given.passes)
        if given.no_record:
            for row in rows:
                print(f"{row.id}: {row.value:.4g} {row.interval} {row.details}")
        else:
            harness.record(rows)


if __name__ == "__main__":
    main()
