"""Run a job in this process: check it, take its directory, start Ray, run it, come back with its result.

`millrace.Job` does the same in a process of its own (driver.py).
"""

import asyncio
import json
import shutil
import signal
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from millrace.cluster import config as configs
from millrace.cluster import run_directory
from millrace.cluster.ahead import Ahead
from millrace.cluster.config import RunConfig
from millrace.cluster.ears import LEAVE_S, STOP_S, UNWIND_S, Brake, stopped
from millrace.cluster.guard import guarded
from millrace.cluster.plan import Plan, make_plan
from millrace.cluster.pulse import death
from millrace.cluster.report import build as report
from millrace.cluster.run import Run
from millrace.cluster.run_directory import held
from millrace.cluster.snapshot import Failure, Snapshot
from millrace.cluster.snapshot import read as read_status
from millrace.cluster.spawn import Spawn, here
from millrace.cluster.supervised import SupervisedRun
from millrace.core.errors import ComponentLost, ConfigError, MillraceError, boundary
from millrace.core.references import find_beside

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
    find_beside(Path.cwd())
    plan = make_plan(config)
    _check_directory(plan, resume=resume)
    return plan


@contextmanager
def ready(config: RunConfig, *, resume: bool, mark: str | None = None) -> Iterator[tuple[Plan, Snapshot]]:
    """Check everything, and hold the run directory, made ready, until all that runs for it has ended.

    Args:
        mark: that this process carries for its guard, if it exists for this run alone.
    Raises:
        ConfigError, DataError, ModelError, RecipeError, RewardError: the run cannot start; nothing was changed.
    """
    plan = dry_run(config, resume=resume)
    with held(config.directory) as lock, guarded(config.directory, lock=lock, mark=mark):
        _prepare(plan, resume=resume)
        steps = 0 if plan.supervised else config.loop.steps
        facts = _committed(config.directory) if resume else {}
        snapshot = Snapshot(config.directory, name=config.name, steps=steps, **facts)
        snapshot.update()
        try:
            yield plan, snapshot
        finally:
            (config.directory / run_directory.STOP).unlink(missing_ok=True)


def execute(
    plan: Plan,
    snapshot: Snapshot,
    *,
    address: str | None,
    local: bool,
    resume: bool,
    say: Say,
    brake: Brake | None = None,
    ahead: Ahead | None = None,
) -> Mapping[str, Any]:
    """Run what `ready` gave; however it ends, status.json says so.

    Args:
        ahead: what was begun of it already.
        brake: the caller hears the signals and pulls it; without one Ctrl-C and SIGTERM are heard here.
    """
    say(str(plan))
    try:
        if local:
            _refuse_two_engines(plan)
            with _reported(plan, say):
                return asyncio.run(_driven(plan, snapshot, here, resume, say, brake))
        with (ahead or Ahead()).cluster(address) as spawn, _reported(plan, say):
            try:
                return asyncio.run(_driven(plan, snapshot, spawn, resume, say, brake, death(address)))
            finally:
                spawn.kill()
    except (KeyboardInterrupt, SystemExit):
        stopped(snapshot, say)
        raise KeyboardInterrupt from None
    except BaseException as caught:
        _failed(snapshot, caught)
        raise


def _refuse_two_engines(plan: Plan) -> None:
    """vLLM keeps what it computes with in its process: two engines there overwrite each other's."""
    engines = plan.config.generation.workers + bool(plan.held_out)
    if engines > 1 and str(plan.engine["name"]).startswith("vllm"):
        raise ConfigError(
            f"a local run is one process, and {engines} vLLM engines (generation.workers = "
            f"{plan.config.generation.workers}" + (", and the held-out evaluation's" if plan.held_out else "") + ") "
            "cannot share one: leave out --local, or take the engine transformers"
        )


def _failed(snapshot: Snapshot, why: BaseException) -> None:
    if not snapshot.status.ended:
        error = Failure(kind=type(why).__name__, message=str(why))
        snapshot.update(state="failed", error=error, eta_s=None)


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
    for name in ("weights", "tensorboard", "rollouts"):
        shutil.rmtree(directory / name, ignore_errors=True)
    directory.mkdir(parents=True, exist_ok=True)
    configs.save(plan.config, directory / run_directory.CONFIG)


async def _driven(
    plan: Plan,
    snapshot: Snapshot,
    spawn: Spawn,
    resume: bool,
    say: Say,
    brake: Brake | None,
    death: Coroutine[Any, Any, str] | None = None,
) -> Mapping[str, Any]:
    """The first Ctrl-C or SIGTERM ends the run in order, the second at once."""
    run: Run | SupervisedRun
    if plan.supervised:
        run = SupervisedRun(plan, spawn=spawn, say=say, snapshot=snapshot)
    else:
        run = Run(plan, spawn=spawn, resume=resume, say=say, snapshot=snapshot)
    end = End(run, snapshot, say)
    if brake is None:
        brake = Brake()
        for number in (signal.SIGINT, signal.SIGTERM):
            with suppress(ValueError, NotImplementedError, RuntimeError):  # not in the main thread
                asyncio.get_running_loop().add_signal_handler(number, end.ask)
    brake.connect(end.ask)
    task = asyncio.ensure_future(run.execute())
    dies = asyncio.ensure_future(death) if death is not None else asyncio.get_running_loop().create_future()
    try:
        await asyncio.wait({task, end.now, dies}, return_when=asyncio.FIRST_COMPLETED)
        if dies.done() and not task.done():
            lost = ComponentLost(_without_ray(dies.result(), snapshot))
            _failed(snapshot, lost)  # before anything that may hang without Ray
            brake.end_within(UNWIND_S + LEAVE_S)
            await _cancelled(task)
            raise lost
        if not task.done():
            await _cancelled(task)
            raise KeyboardInterrupt
        return task.result()
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    finally:
        dies.cancel()
        end.forget()


class End:
    """What is done when a run is told to end: in order within STOP_S where it has begun, at once otherwise."""

    def __init__(self, run: Run | SupervisedRun, snapshot: Snapshot, say: Say) -> None:
        self._run, self._snapshot, self._say = run, snapshot, say
        self._asked = False
        self._stopping: asyncio.Future[None] | None = None
        self._late: asyncio.TimerHandle | None = None
        self.now: asyncio.Future[None] = asyncio.get_running_loop().create_future()  # done when it may not go on

    def ask(self, now: bool = False) -> None:
        """End it; at once the second time, or told so, or while all it does is to load."""
        if self._asked or now or self._snapshot.status.state == "starting":
            self._cut()
            return
        self._late = asyncio.get_running_loop().call_later(STOP_S, self._cut)
        self._asked = True
        if not self._snapshot.status.ended:
            self._say(f"stopping, with a checkpoint if it takes less than {STOP_S:g} s; once more to stop at once")
            self._stopping = asyncio.ensure_future(self._run.stop())

    def _cut(self) -> None:
        if not self.now.done():
            self.now.set_result(None)

    def forget(self) -> None:
        """It has ended."""
        if self._late is not None:
            self._late.cancel()
        if self._stopping is not None:
            self._stopping.cancel()


async def _cancelled(task: asyncio.Future[Any]) -> None:
    """Cancel it, and see it end if it does so in time."""
    task.cancel()
    await asyncio.wait({task}, timeout=UNWIND_S)
    if task.done() and not task.cancelled():
        task.exception()  # is seen: it comes of being cut off


def _without_ray(what: str, snapshot: Snapshot) -> str:
    status = snapshot.status
    return (
        f"{what}, at step {status.step} of {status.steps}: without it no component can be reached, and the run cannot "
        f"go on. Everything that was committed, up to step {status.committed_step}, is on the disk: continue with "
        f"`millrace train --resume {status.id}`. Was it the machine's memory? `dmesg` tells whom the system killed"
    )
