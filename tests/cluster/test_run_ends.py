"""How a run ends when what it needs goes away: its queue, its held-out evaluation, its journal's room."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from millrace.cluster import jobs
from millrace.cluster import run as run_module
from millrace.cluster import wiring as wiring_module
from millrace.cluster.config import RunConfig
from millrace.cluster.ears import Brake
from millrace.cluster.held_out import HeldOut
from millrace.cluster.plan import make_plan
from millrace.cluster.run import Run
from millrace.cluster.spawn import InProcess
from millrace.core.errors import ComponentLost, EngineDeadError, JournalFullError
from millrace.learner.learner import Learner


class Troubled:
    """A queue whose calls meet what `trouble` raises."""

    def __init__(self, queue: Any, trouble: Callable[[], None]) -> None:
        self._queue, self._trouble = queue, trouble

    def __getattr__(self, method: str) -> Any:
        async def call(*args: Any, **kwargs: Any) -> Any:
            self._trouble()
            return await getattr(self._queue, method)(*args, **kwargs)

        return call


class Troubling(InProcess):
    """Components in this process; the queue is `Troubled`."""

    def __init__(self, trouble: Callable[[], None]) -> None:
        self._trouble = trouble

    def __call__(self, cls: type, *args: Any, name: str, **kwargs: Any) -> Any:
        made = super().__call__(cls, *args, name=name, **kwargs)
        return Troubled(made, self._trouble) if name == "queue" else made


def run_of(config: RunConfig, spawn: InProcess, said: list[str] | None = None) -> Run:
    config.directory.mkdir(parents=True, exist_ok=True)
    say = said.append if said is not None else lambda line: None
    return Run(make_plan(config), spawn=spawn, resume=False, say=say)


def events(config: RunConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.directory / "events.jsonl").read_text().splitlines()]


def test_a_queue_that_cannot_be_constructed_ends_the_run_at_once(make_run: Any) -> None:
    def refuse() -> None:
        raise ConnectionRefusedError("queue could not be started: ledger.sqlite is damaged")

    async def run() -> None:
        async with asyncio.timeout(20):
            await run_of(make_run(), Troubling(refuse)).execute()

    with pytest.raises(ComponentLost, match=r"ledger\.sqlite is damaged"):
        asyncio.run(run())


def test_a_run_that_is_stopped_while_its_queue_is_down_was_stopped_and_has_not_failed(
    make_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "STOP_S", 0.5)
    down = False

    def trouble() -> None:
        if down:
            raise ConnectionError("queue is gone")

    async def run() -> None:
        nonlocal down
        made = run_of(config, Troubling(trouble))
        task = asyncio.ensure_future(made.execute())
        metrics = config.directory / "metrics.jsonl"
        while not (metrics.is_file() and metrics.read_bytes()):
            await asyncio.sleep(0.01)
        down = True
        await made.stop()
        await task

    config = make_run(loop={"steps": 10_000})
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(run())
    assert events(config)[-1]["kind"] == "interrupted"


def test_a_run_that_is_stopped_while_it_loads_waits_for_nothing(make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Loading(Learner):
        async def run(self) -> None:
            await asyncio.Event().wait()

    def say(line: str) -> None:
        said.append(line)
        if line.startswith("starting the learner"):
            brake.pull(now=False)

    monkeypatch.setattr(wiring_module, "LEARNER", Loading)
    brake, said, config = Brake(), list[str](), make_run()
    with jobs.ready(config, resume=False) as (plan, snapshot), pytest.raises(KeyboardInterrupt):
        jobs.execute(plan, snapshot, address=None, local=True, resume=False, say=say, brake=brake)
    assert not [line for line in said if line.startswith("stopping, with a checkpoint")]
    assert (snapshot.status.state, snapshot.status.note) == ("stopped", said[-1])
    assert said[-1].startswith("stopped before the first step was made; continue with `millrace train --resume")
    assert events(config)[-1]["kind"] == "interrupted"


def test_an_evaluator_that_is_lost_while_the_run_ends_is_told_again_to_finish(
    make_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lives, closed = 0, list[int]()

    class Dying(HeldOut):
        async def run(self) -> None:
            nonlocal lives
            lives += 1
            if lives == 1:
                await self._finishing.wait()
                raise EngineDeadError("the engine is gone")
            await super().run()

        async def close(self) -> None:
            closed.append(lives)
            await super().close()

    monkeypatch.setattr(wiring_module, "HeldOut", Dying)
    said = list[str]()
    found = jobs.train(make_run(loop={"steps": 4}, stall_s=15.0), local=True, say=said.append)
    assert (found["ended"], lives) == ("finished", 2)
    assert not [line for line in said if "did not leave" in line]
    assert closed == [1, 2]  # in one process an engine ends by its close alone
    assert [each["step"] for each in found["held_out"]["all"]] == [0, 4]


def test_a_full_disk_is_waited_for_and_told(make_run: Any) -> None:
    calls, said = 0, list[str]()

    def trouble() -> None:
        nonlocal calls
        calls += 1
        if 40 < calls < 60:
            raise JournalFullError("ledger.sqlite cannot be written: make room on that disk")

    config = make_run()
    found = asyncio.run(run_of(config, Troubling(trouble), said).execute())
    assert (found["ended"], found["steps"]) == ("finished", 12)
    assert not {"lost", "restarting"} & {each["kind"] for each in events(config)}


def test_rollouts_that_cannot_be_written_do_not_undo_a_finished_run(make_run: Any, tmp_path: Path) -> None:
    said = list[str]()

    class NoRoom(InProcess):
        def __call__(self, cls: type, *args: Any, name: str, **kwargs: Any) -> Any:
            made = super().__call__(cls, *args, name=name, **kwargs)
            if name == "queue":

                async def export() -> int:
                    raise JournalFullError("rollouts.parquet cannot be written: make room on that disk")

                made._component.export = export
            return made

    config = make_run(loop={"steps": 2})
    found = asyncio.run(run_of(config, NoRoom(), said).execute())
    assert found["ended"] == "finished"
    assert "rollouts not written" in {each["kind"] for each in events(config)}
    assert any("millrace rollouts" in line and "make room" in line for line in said)
