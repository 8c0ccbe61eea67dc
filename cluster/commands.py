"""What the commands of `millrace` that are about runs do. Each takes the parsed command line of its name."""

import json
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from millrace.cluster import config as configs
from millrace.cluster import run_directory
from millrace.cluster.job import Job, all_below
from millrace.cluster.progress import duration, line, shown
from millrace.cluster.snapshot import Status, cut_short
from millrace.core.errors import ConfigError, MillraceError

AT_ONCE_S = 15.0  # that a run which is told to end at once is waited for
LAST_LINES = 20  # of progress, that one who attaches sees first


def train(given: Namespace) -> None:
    """Submit or resume a run, and watch it to its end."""
    if given.run is None and given.resume is None:
        raise ConfigError("give either RUN.toml, or --resume DIRECTORY")
    if given.resume and (given.run or given.settings):
        said = filter(None, (given.run, *(f"{'.'.join(keys)}={value}" for keys, value in given.settings)))
        raise ConfigError(f"a resumed run keeps its configuration: leave out {' '.join(said)}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the run ends before this process does
    where = {"address": given.address, "local": given.local, "attached": not given.detach}
    if sys.stderr.isatty():
        print("checking the model, the data, the recipe and the verifier", file=sys.stderr)
    if given.resume and not given.dry_run:
        job = Job.resume(given.resume, **where)
        if job.ended and (status := job.status()).state == "finished":
            print(f"{job.id} is finished: all of its {status.steps} steps are made")
            print(summary(job.result()))
            return
    else:
        if given.resume:
            config = configs.of_directory(Job.attach(given.resume).directory)
        else:
            config = configs.load(given.run, settings=given.settings)
        if given.dry_run:
            print(import_module("millrace.cluster.jobs").dry_run(config, resume=bool(given.resume)))
            return
        job = Job.submit(config, **where)
    if given.detach:
        print(f"{job.id}\nmillrace attach {job.id} watches it, millrace stop {job.id} ends it")
        return
    _watch(job, plain=given.plain, ours=True)


def jobs(given: Namespace) -> None:
    """A line per run, the newest last."""
    directories = all_below(Path(given.runs))
    if not directories:
        raise ConfigError(f"{given.runs}: there are no runs below it")
    width = max(len(directory.name) for directory in directories)
    for directory in directories:
        with suppress(ConfigError):  # it has never begun
            status = Job.attach(directory.absolute()).status()
            numbers = line(status) if status.state in ("running", "stopping") else _ended(status)
            restarts = (
                f"  {status.restarts} restarts" if status.restarts > 1 else "  1 restart" if status.restarts else ""
            )
            last = f"  {status.incident}" if status.incident and not status.ended else ""
            print(f"{directory.name:<{width}}  {status.state:<8}  {numbers}{restarts}{last}")


def status(given: Namespace) -> None:
    """What a run does right now."""
    status = Job.attach(given.id).status()
    if given.json:
        print(status.to_json())
        return
    ago_s = time.time() - status.time_s
    print(f"{status.id}\n{status.state}, process {status.pid} on {status.host}, {duration(ago_s)} ago")
    print(line(status))
    if status.learner["phase"] and not status.ended:
        print(f"learner: {status.learner['phase']} for {duration(status.learner['phase_s'])}")
    for name, why in status.waits.items():
        print(f"{name}: {why}")
    for text in troubles(status):
        print(text)
    if status.error is not None:
        print(f"{status.error['kind']}: {status.error['message']}")


def attach(given: Namespace) -> None:
    """Watch a run that goes on by itself."""
    job = Job.attach(given.id)
    job.status()  # it has begun
    job.said = _before_last(job.directory / run_directory.PROGRESS_LOG, LAST_LINES)
    _watch(job, plain=given.plain, ours=False)


def stop(given: Namespace) -> None:
    """Order a run to stop."""
    job = Job.attach(given.id)
    if job.ended:
        print(f"{job.id} is not running: {job.status().state}")
        return
    job.stop(now=given.now)
    print(f"{job.id} ends {'at once' if given.now else 'after the step under way, with a checkpoint'}")


def report(given: Namespace) -> None:
    """Write report.html."""
    print(import_module("millrace.cluster.report.build").write(Job.attach(given.id).directory))


def rollouts(given: Namespace) -> None:
    """Write rollouts.parquet."""
    path, rows = import_module("millrace.cluster.rollouts").write(Job.attach(given.id).directory)
    print(f"{path}: {rows} rollouts")


def _watch(job: Job, *, plain: bool, ours: bool) -> None:
    """Show a run until it has ended. If it is ours, the first Ctrl-C ends it in order, the second at once."""
    interrupts = 0
    while True:
        try:
            _show(job, plain=plain)
            break
        except KeyboardInterrupt:
            if not ours:
                print(f"\n{job.id} goes on; millrace stop {job.id} ends it")
                return
            interrupts += 1
            job.stop(now=interrupts > 1)
            if interrupts > 1:
                print(f"\nending {job.id} at once", flush=True)
                with suppress(MillraceError):
                    _say_of(job.wait(AT_ONCE_S))
                raise
    status = job.wait()
    if status.state == "stopped" and not (job.directory / run_directory.RESULT).is_file():
        _say_of(status)
        raise KeyboardInterrupt
    print(summary(job.result()))


def _say_of(status: Status) -> None:
    """The last words of a run that ended without a result."""
    print(status.note or cut_short(status))


def _show(job: Job, *, plain: bool) -> None:
    """Until the run has ended: the live view in a terminal, else its plain lines."""
    if sys.stdout.isatty() and not plain:
        import_module("millrace.cluster.view.live").follow(job)
        return
    for text in job.lines():
        print(text, flush=True)


def troubles(status: Status) -> list[str]:
    """What was lost and given up so far, a line each; nothing where all went well.

    >>> troubles(Status(id="x", state="running", incidents=2, incident="queue was lost: killed", quarantined=1))
    ['2 incidents, the last: queue was lost: killed', '1 prompt was quarantined: see events.jsonl']
    """
    said = [
        f"{name}: {each['state']} for {duration(max(status.time_s - each['since_s'], 0))}, restarts {each['restarts']}"
        for name, each in status.components.items()
        if each["restarts"] or name in status.down
    ]
    if status.incidents:
        said.append(f"{status.incidents} incident{'s, the last' if status.incidents > 1 else ''}: {status.incident}")
    if status.quarantined:
        many = f"{status.quarantined} prompts were" if status.quarantined > 1 else "1 prompt was"
        said.append(f"{many} quarantined: see events.jsonl")
    return said


def _before_last(path: Path, lines: int) -> int:
    """How many bytes come before the last lines of a file."""
    if not path.is_file():
        return 0
    whole = path.read_bytes().rpartition(b"\n")[0].split(b"\n")
    return sum(len(each) + 1 for each in whole[:-lines])


def _ended(status: Status) -> str:
    said = f"step {status.step}/{status.steps}"
    if status.reward is not None:
        said += f"  reward {shown(status.reward)}"
    if status.held_out is not None:
        said += f"  held-out {shown(status.held_out['mean'])} @{status.held_out['step']}"
    return f"{said}  {status.error['message'].splitlines()[0]}" if status.error is not None else said


def summary(found: Mapping[str, Any]) -> str:
    """The end of a run, for a person.

    >>> print(summary({"ended": "finished", "steps": 2, "seconds": 61.0, "directory": "runs/x"}))
    finished after 2 steps in 61 s
    runs/x/report.html
    """
    lines = [f"{found['ended']} after {found['steps']} steps in {found['seconds']:.0f} s"]
    for name, title in (("reward", "training reward"), ("held_out", "held-out reward")):
        if pair := found.get(name):
            first, last = (
                value["mean"] if isinstance(value, Mapping) else value for value in (pair["first"], pair["last"])
            )
            lines.append(f"{title} {shown(first)} -> {shown(last)}")
    if waste := found.get("waste"):
        lines.append("tokens " + json.dumps({row: many for row, many in waste.items() if many or row == "unaccounted"}))
    if found["ended"] == "stopped" and found.get("checkpoint"):
        lines.append(f"continue with: millrace train --resume {found['directory']}")
    lines.append(f"{found['directory']}/{run_directory.REPORT}")
    return "\n".join(lines)
