"""Run a job from Python: check it, start Ray, run it, come back with its result."""

import asyncio
import json
import shutil
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from millrace.cluster import config as configs
from millrace.cluster.config import RunConfig
from millrace.cluster.plan import Plan, make_plan
from millrace.cluster.run import Run
from millrace.cluster.runtime import ray_cluster
from millrace.cluster.spawn import OnRay, Spawn, here
from millrace.cluster.supervised import SupervisedRun
from millrace.core.errors import ConfigError

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
    if resume and (found := _finished(config)) is not None:
        say(f"{config.directory} is finished: all of its {found['steps']} steps are made")
        return found
    plan = dry_run(config)
    _prepare(plan, resume=resume)
    say(str(plan))
    if local:
        return asyncio.run(_execute(plan, here, resume, say))
    with ray_cluster(address):
        spawn = OnRay()
        try:
            return asyncio.run(_execute(plan, spawn, resume, say))
        finally:
            spawn.kill()


def dry_run(config: RunConfig) -> Plan:
    """Check everything that can be checked before a run, and say what would run."""
    if (beside := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, beside)  # "package.module:function" beside the user
    return make_plan(config)


def _finished(config: RunConfig) -> Mapping[str, Any] | None:
    """The result of a run that has nothing left to do."""
    path = config.directory / "result.json"
    found: Mapping[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    whole = found.get("ended") == "finished" and found["steps"] >= config.loop.steps
    return found if whole else None


def _prepare(plan: Plan, *, resume: bool) -> None:
    """Make the run directory; one that holds a run is not written over."""
    config, directory = plan.config, plan.config.directory
    if resume and plan.supervised:
        raise ConfigError(
            f"{directory}: recipe {config.recipe.origin} commits nothing until it is done, so there is nothing to "
            "continue from: remove the directory and train again"
        )
    if resume:
        return
    metrics = directory / "metrics.jsonl"
    if metrics.exists() and any(
        json.loads(line)["step"] for line in metrics.read_text().rpartition("\n")[0].splitlines()
    ):
        raise ConfigError(
            f"{directory} holds a run already: continue it with --resume {directory}, "
            "give this one another name, or remove the directory"
        )
    for name in ("metrics.jsonl", "ledger.jsonl"):  # of a run that ended before its first step
        (directory / name).unlink(missing_ok=True)
    for name in ("weights", "tensorboard"):
        shutil.rmtree(directory / name, ignore_errors=True)
    directory.mkdir(parents=True, exist_ok=True)
    configs.save(config, directory / "config.toml")


async def _execute(plan: Plan, spawn: Spawn, resume: bool, say: Say) -> Mapping[str, Any]:
    """The first Ctrl-C or SIGTERM ends the run in order, the second at once."""
    run: Run | SupervisedRun
    if plan.supervised:
        run = SupervisedRun(plan, spawn=spawn, say=say)
    else:
        run = Run(plan, spawn=spawn, resume=resume, say=say)
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(run.execute())
    stopping: list[asyncio.Future[None]] = []

    def interrupt() -> None:
        if stopping:
            task.cancel()
            return
        say("stopping after this step, with a checkpoint; once more to stop at once")
        stopping.append(asyncio.ensure_future(run.stop()))

    for number in (signal.SIGINT, signal.SIGTERM):
        with suppress(ValueError, NotImplementedError):  # not in the main thread
            loop.add_signal_handler(number, interrupt)
    try:
        return await task
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
