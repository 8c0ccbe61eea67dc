"""Steps that a run makes while one of its processes is killed every minute, over what the measured restarts allow.

    bound = rate x (seconds - what was lost)

The rate is that of the same run outside of its recoveries. Lost are, for each kill, the seconds from the signal until
the component serves again, times the share of the work that it stops: 1, or 1 / engines for one of several engines; for
a learner also the steps since its last commit, which it makes again. Kills rotate through the roles.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import signal
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.sorting_run import sorting_run
from examples import tiny_model
from millrace.cluster import config as configs
from millrace.cluster.job import Job

ROLES = ("generation-0", "learner", "reward-0", "queue", "weights")
WARM_STEPS = 5
SETTLED_S = 3.0  # after a component serves again, until what it does counts as undisturbed


@dataclass(frozen=True, slots=True)
class Kill:
    """One kill, and what it cost."""

    component: str
    noticed_s: float  # from the signal until the supervisor knew
    recovery_s: float  # from the signal until the component served again
    redone_s: float  # of the learner's steps that were made again


@dataclass(frozen=True, slots=True)
class Found:
    """What a run did in its time."""

    steps: int  # of the surviving history
    seconds: float
    rate: float  # steps per second, outside of recoveries
    kills: Sequence[Kill]

    def bound(self, engines: int) -> float:
        """Steps that the restarts allow."""
        lost_s = 0.0
        for kill in self.kills:
            share = 1 / engines if kill.component.startswith("generation") else 1.0
            lost_s += share * kill.recovery_s + kill.redone_s
        return self.rate * (self.seconds - lost_s)


def started(directory: Path, *, engines: int) -> Job:
    """A run that would go on for ever; returns when its first steps are made."""
    table = sorting_run(steps=1_000_000, groups_per_step=16)
    del table["data"]["held_out"], table["evaluation"]
    table["model"] = str(directory / "model")
    table["runs"] = str(directory / "runs")
    table["generation"] = {"workers": engines}
    table["learner"] = {"learning_rate": 1e-9, "checkpoint_every": 20}  # a policy that changes has other lengths later
    job = Job.submit(configs.of(table, root=directory, source="benchmark", name=f"chaos-{engines}"))
    while job.status().step < WARM_STEPS:
        if job.ended:
            job.wait()
        time.sleep(0.2)
    return job


def disturbed(job: Job, *, seconds: float, every_s: float) -> list[tuple[str, float, int]]:
    """Let it run for `seconds`, with a kill each `every_s`, and end it. Component, time and steps to redo of each."""
    began = time.time()
    roles, killed = iter(ROLES * 100), []
    while (now := time.time() - began) < seconds:
        if now > every_s * (len(killed) + 0.5):
            status = job.status()
            name = next(roles)
            redone = status.step - status.committed_step if name == "learner" else 0
            os.kill(status.components[name]["pid"], signal.SIGKILL)
            killed.append((name, time.time(), redone))
        time.sleep(0.2)
    job.stop(now=True)
    while not job.ended:
        time.sleep(0.2)
    return killed


def found(job: Job, killed: Sequence[tuple[str, float, int]], *, seconds: float) -> Found:
    """Out of what the run has recorded."""
    events = list(job.events())
    times = [row["time_s"] for row in job.metrics() if row["step"] > WARM_STEPS]
    made = [at for at in times if at <= times[0] + seconds]
    ends = [(at, serving(events, name, at)) for name, at, _ in killed]
    calm = [at for at in made if not any(low <= at <= high + SETTLED_S for low, high in ends)]
    calm_s = seconds - sum(high + SETTLED_S - low for low, high in ends)
    rate = len(calm) / calm_s
    kills = [
        Kill(name, lost(events, name, at) - at, end - at, redone / rate)
        for (name, at, redone), (_, end) in zip(killed, ends, strict=True)
    ]
    return Found(len(made), seconds, rate, kills)


def lost(events: Sequence[Any], name: str, at_s: float) -> float:
    """When the supervisor told that a component, killed at a time, was lost."""
    return _told(events, "lost", name, at_s)


def serving(events: Sequence[Any], name: str, at_s: float) -> float:
    """When it told that the component was back."""
    return _told(events, "serving", name, at_s)


def _told(events: Sequence[Any], kind: str, name: str, at_s: float) -> float:
    return next(e["time_s"] for e in events if e["kind"] == kind and e["component"] == name and e["time_s"] > at_s)


def main() -> None:
    """One engine and two."""
    parser = harness.arguments(__doc__)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--every", type=float, default=60.0, help="seconds between kills")
    given = parser.parse_args()
    harness.refuse_a_busy_machine(anyway=given.busy)
    where = harness.machine()
    runs: dict[int, Found] = {}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        tiny_model.build(directory / "model")
        for engines in (1, 2):
            job = started(directory, engines=engines)
            killed = disturbed(job, seconds=given.seconds, every_s=given.every)
            runs[engines] = found(job, killed, seconds=given.seconds)
    rows = rows_of(runs, every_s=given.every, where=where)
    if not given.no_record:
        harness.record(rows)


def rows_of(runs: Mapping[int, Found], *, every_s: float, where: str) -> list[harness.Row]:
    """A row for each number of engines, and one for each role's recovery."""
    rows = []
    for engines, run in runs.items():
        allowed = run.bound(engines)
        what = f"steps in {run.seconds:g} s with a kill each {every_s:g} s / bound, {engines} engine(s)"
        details = {"steps": run.steps, "bound": allowed, "rate": run.rate, "kills": [asdict(k) for k in run.kills]}
        value = run.steps / allowed
        rows.append(harness.row(f"chaos-{engines}", what, value, target=(">=", 0.95), where=where, details=details))
    for role in ROLES:
        own = [kill for run in runs.values() for kill in run.kills if kill.component == role]
        if own:
            median = statistics.median(kill.recovery_s for kill in own)
            details = {"noticed_s": [k.noticed_s for k in own], "recovery_s": [k.recovery_s for k in own]}
            what = f"seconds from kill -9 of {role} until it serves again"
            rows.append(harness.row(f"recovery-{role}", what, median, target=None, where=where, details=details))
    return rows


if __name__ == "__main__":
    main()
