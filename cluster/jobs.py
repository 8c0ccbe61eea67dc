"""Run a job in this process: check it, take its directory, start Ray, run it, come back with its result.

`millrace.Job` does the same in a process of its own (driver.py).
"""

import asyncio
import json
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from millrace.cluster import config as configs
from millrace.cluster import run_directory
from millrace.cluster.config import RunConfig
from millrace.cluster.plan import Plan, make_plan
from millrace.cluster.report import build as report
from millrace.cluster.run import Run
from millrace.cluster.run_directory import held
from millrace.cluster.runtime import ray_cluster
from millrace.cluster.snapshot import Failure, Snapshot
from millrace.cluster.snapshot import read as read_status
from millrace.cluster.spawn import OnRay, Spawn, here
from millrace.cluster.supervised import SupervisedRun
from millrace.core.errors import ConfigError, MillraceError, boundary

Say = Callable[[str], None]


def printed(line: str) -> None:
    """Say it on standard output, at once."""
    print(line, flush=True)


def train(
    config: RunConfig,
    *,
    address: str | None = None,
    local: bool = False,
    resume: bool = False,
    say: Say = printed,
) -> Mapping[str, Any]:
    """Run a configuration to its end.

    Args:
        address: of a running Ray cluster; without it Ray starts here, for this run.
        local: everything in this process, without Ray.
        resume: continue the run in the configuration's directory from its last commit.
        say: receives progress lines.
    Returns:
        What result.json holds.
    Raises:
        ConfigError, DataError, ModelError, RecipeError, RewardError: before anything expensive starts.
        MillraceError: a component failed; the message names it.
    """
    if resume and (found := run_directory.finished(config.directory, steps=config.loop.steps)) is not None:
        say(f"{config.directory} is finished: all of its {found['steps']} steps are made")
        return found
    with ready(config, resume=resume) as (plan, snapshot):
        return execute(plan, snapshot, address=address, local=local, resume=resume, say=say)


def dry_run(config: RunConfig, *, resume: bool = False) -> Plan:
    """Check everything that can be checked before a run, its directory among it, and say what would run."""
    if (beside := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, beside)  # "package.module:function" beside the user
    plan = make_plan(config)
    _check_directory(plan, resume=resume)
    return plan


@contextmanager
def ready(config: RunConfig, *, resume: bool) -> Iterator[tuple[Plan, Snapshot]]:
    """Check everything, and hold the run directory, made ready.

    Raises:
        ConfigError, DataError, ModelError, RecipeError, RewardError: the run cannot start; nothing was changed.
    """
    plan = dry_run(config, resume=resume)
    with held(config.directory):
        _prepare(plan, resume=resume)
        steps = 0 if plan.supervised else config.loop.steps
        facts = _committed(config.directory) if resume else {}
        snapshot = Snapshot(config.directory, name=config.name, steps=steps, **facts)
        snapshot.update()
        try:
            yield plan, snapshot
        finally:
            (config.directory / run_directory.STOP).unlink(missing_ok=True)


class Brake:
    """Ends a run from any thread: in order when first asked, at once when asked again or told so."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._act: Callable[[bool], None] | None = None
        self._asked: list[bool] = []
        self.released = False  # there is nothing left to end

    def pull(self, *, now: bool) -> None:
        """Ask. What is asked before the run has begun, it hears when it begins."""
        self._asked.append(now)
        if self._loop is not None and self._act is not None:
            with suppress(RuntimeError):  # the loop has ended meanwhile
                self._loop.call_soon_threadsafe(self._act, now)

    @property
    def connected(self) -> bool:
        """Whether a run listens."""
        return self._act is not None

    def connect(self, act: Callable[[bool], None]) -> None:
        """From the loop of the run: `act` gets what is asked."""
        self._loop, self._act = asyncio.get_running_loop(), act
        for now in self._asked:
            act(now)


def execute(
    plan: Plan,
    snapshot: Snapshot,
    *,
    address: str | None,
    local: bool,
    resume: bool,
    say: Say,
    brake: Brake | None = None,
) -> Mapping[str, Any]:
    """Run what `ready` gave; however it ends, status.json says so."""
    brake = brake or Brake()
    say(str(plan))
    with _reported(plan, say):
        return _executed(plan, snapshot, address, local, resume, say, brake)


@contextmanager
def _reported(plan: Plan, say: Say) -> Iterator[None]:
    """However a run ends, it leaves report.html."""
    try:
        yield
    finally:
        try:
            with boundary("writing the report"):
                report.write(plan.config.directory)
        except MillraceError as caught:
            say(f"there is no new report: {caught}")


def _executed(
    plan: Plan, snapshot: Snapshot, address: str | None, local: bool, resume: bool, say: Say, brake: Brake
) -> Mapping[str, Any]:
    try:
        if local:
            return asyncio.run(_driven(plan, snapshot, here, resume, say, brake))
        with ray_cluster(address):
            spawn = OnRay()
            try:
                return asyncio.run(_driven(plan, snapshot, spawn, resume, say, brake))
            finally:
                spawn.kill()
    except KeyboardInterrupt:
        if not snapshot.status.ended:
            snapshot.update(state="stopped", eta_s=None, waits={})
        raise
    except BaseException as caught:
        if not snapshot.status.ended:
            error = Failure(kind=type(caught).__name__, message=str(caught))
            snapshot.update(state="failed", error=error, eta_s=None)
        raise
    finally:
        brake.released = True


def _check_directory(plan: Plan, *, resume: bool) -> None:
    """A directory that holds a run is not written over; a run that commits nothing is not continued."""
    config, directory = plan.config, plan.config.directory
    if resume and plan.supervised:
        raise ConfigError(
            f"{directory}: recipe {config.recipe.origin} commits nothing until it is done, so there is nothing to "
            "continue from: remove the directory and train again"
        )
    metrics = directory / run_directory.METRICS
    if resume or not metrics.exists():
        return
    if any(json.loads(line)["step"] for line in metrics.read_text().rpartition("\n")[0].splitlines()):
        raise ConfigError(
            f"{directory} holds a run already: continue it with --resume {directory}, "
            "give this one another name, or remove the directory"
        )


def _committed(directory: Path) -> dict[str, Any]:
    """What a resumed run has, even if it ends before it has begun: its committed steps, as they were last reported."""
    before = read_status(directory)
    if before is None:
        return {}
    return {"step": before.committed_step, "committed_step": before.committed_step, "held_out": before.held_out}


def _prepare(plan: Plan, *, resume: bool) -> None:
    """Make the run directory ready, once it is held."""
    directory = plan.config.directory
    _check_directory(plan, resume=resume)  # again: another run may have begun and ended in it just now
    if resume:
        for name in (run_directory.STOP, run_directory.RESULT):
            (directory / name).unlink(missing_ok=True)
        return
    for name in run_directory.OF_A_RUN:  # of one that ended before its first step
        (directory / name).unlink(missing_ok=True)
    for name in ("weights", "tensorboard"):
        shutil.rmtree(directory / name, ignore_errors=True)
    directory.mkdir(parents=True, exist_ok=True)
    configs.save(plan.config, directory / run_directory.CONFIG)


async def _driven(
    plan: Plan, snapshot: Snapshot, spawn: Spawn, resume: bool, say: Say, brake: Brake
) -> Mapping[str, Any]:
    """The first Ctrl-C or SIGTERM ends the run in order, the second at once."""
    run: Run | SupervisedRun
    if plan.supervised:
        run = SupervisedRun(plan, spawn=spawn, say=say, snapshot=snapshot)
    else:
        run = Run(plan, spawn=spawn, resume=resume, say=say, snapshot=snapshot)
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(run.execute())
    stopping: list[asyncio.Future[None]] = []

    def interrupt(now: bool = False) -> None:
        if stopping or now:
            task.cancel()
            return
        say("stopping after this step, with a checkpoint; once more to stop at once")
        stopping.append(asyncio.ensure_future(run.stop()))

    brake.connect(interrupt)
    for number in (signal.SIGINT, signal.SIGTERM):
        with suppress(ValueError, NotImplementedError):  # not in the main thread
            loop.add_signal_handler(number, interrupt)
    try:
        return await task
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
