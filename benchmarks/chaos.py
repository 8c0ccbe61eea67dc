"""Steps that a run makes while one of its processes is killed every minute, over what the measured restarts allow.

    bound = steps per second without kills x (seconds - what was lost)

Lost are, for each kill, the seconds from the signal until the component serves again, times the share of the work that
it stops: 1, or 1 / engines for one of several engines; for a learner also the steps since its last commit, which it
makes again. Both arms are runs on Ray and vLLM, one after the other; kills rotate through the roles.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import signal
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.sorting_run import sorting_run
from examples import tiny_model
from millrace.cluster import config as configs
from millrace.cluster.job import Job

ROLES = ("generation-0", "learner", "reward-0", "queue", "weights")
WARM_STEPS = 5


@dataclass(frozen=True, slots=True)
class Kill:
    """One kill, and what it cost."""

    component: str
    noticed_s: float  # from the signal until the supervisor knew
    recovery_s: float  # from the signal until the component served again
    redone_s: float  # of the learner's steps that were made again


@dataclass(frozen=True, slots=True)
class Arm:
    """What one run did in its time."""

    steps: int
    seconds: float
    kills: Sequence[Kill] = ()


def started(directory: Path, *, engines: int, number: int) -> Job:
    """A run that would go on for ever; returns when its first steps are made."""
    table = sorting_run(steps=1_000_000, groups_per_step=16)
    del table["data"]["held_out"], table["evaluation"]
    table["model"] = str(directory / "model")
    table["runs"] = str(directory / "runs")
    table["generation"] = {"workers": engines}
    table["learner"] = {"learning_rate": 1e-9, "checkpoint_every": 20}  # a policy that changes has other lengths later
    job = Job.submit(configs.of(table, root=directory, source="benchmark", name=f"chaos-{engines}-{number}"))
    while job.status().step < WARM_STEPS:
        if job.ended:
            job.wait()
        time.sleep(0.2)
    return job


def measure(job: Job, *, seconds: float, every_s: float | None) -> Arm:
    """Let it run for `seconds`, with a kill each `every_s`, and end it."""
    began, first = time.time(), job.status().step
    roles, killed = iter(ROLES * 100), []
    while (now := time.time() - began) < seconds:
        if every_s is not None and now > every_s * (len(killed) + 0.5):
            status = job.status()
            name = next(roles)
            redone = status.step - status.committed_step if name == "learner" else 0
            os.kill(status.components[name]["pid"], signal.SIGKILL)
            killed.append((name, time.time(), redone))
        time.sleep(0.2)
    steps, elapsed = job.status().step - first, time.time() - began
    job.stop(now=True)
    while not job.ended:
        time.sleep(0.2)
    events = list(job.events())
    return Arm(steps, elapsed, [cost(events, *each, step_s=elapsed / max(1, steps)) for each in killed])


def cost(events: Sequence[Any], name: str, at_s: float, redone: int, *, step_s: float) -> Kill:
    """Of the kill of a component at a time."""
    of = [each for each in events if each.get("component") == name and each["time_s"] > at_s]
    noticed = next(each["time_s"] for each in of if each["kind"] == "lost")
    serving = next(each["time_s"] for each in of if each["kind"] == "serving")
    return Kill(name, noticed - at_s, serving - at_s, redone * step_s)


def bound(clean: Arm, chaos: Arm, *, engines: int) -> float:
    """Steps that the arm with kills could have made."""
    lost_s = 0.0
    for kill in chaos.kills:
        share = 1 / engines if kill.component.startswith("generation") else 1.0
        lost_s += share * kill.recovery_s + kill.redone_s
    return clean.steps / clean.seconds * (chaos.seconds - lost_s)


def main() -> None:
    """One engine and two, each without and with kills."""
    parser = harness.arguments(__doc__)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--every", type=float, default=60.0, help="seconds between kills")
    parser.add_argument("--clean-seconds", type=float, default=120.0, help="of the arm without kills, for its rate")
    given = parser.parse_args()
    harness.refuse_a_busy_machine(anyway=given.busy)
    where = harness.machine()
    rows, kills = [], []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        tiny_model.build(directory / "model")
        for engines in (1, 2):
            job = started(directory, engines=engines, number=0)
            clean = measure(job, seconds=given.clean_seconds, every_s=None)
            job = started(directory, engines=engines, number=1)
            chaos = measure(job, seconds=given.seconds, every_s=given.every)
            kills += list(chaos.kills)
            allowed = bound(clean, chaos, engines=engines)
            details = {"clean": clean, "chaos": chaos, "bound_steps": allowed}
            what = (
                f"useful steps in {given.seconds:g} s with a kill each {given.every:g} s / bound, {engines} engine(s)"
            )
            rows.append(
                harness.row(
                    f"chaos-{engines}",
                    what,
                    chaos.steps / allowed,
                    target=(">=", 0.95),
                    where=where,
                    details={key: str(value) for key, value in details.items()},
                )
            )
            print(f"  {engines} engines: {chaos.steps} steps, clean {clean.steps}, bound {allowed:.0f}")
    for role in ROLES:
        own = [kill for kill in kills if kill.component == role]
        if own:
            median = statistics.median(kill.recovery_s for kill in own)
            details = {"noticed_s": [k.noticed_s for k in own], "recovery_s": [k.recovery_s for k in own]}
            what = f"seconds from kill -9 of {role} until it serves again"
            rows.append(harness.row(f"recovery-{role}", what, median, target=None, where=where, details=details))
    if not given.no_record:
        harness.record(rows)


if __name__ == "__main__":
    main()
