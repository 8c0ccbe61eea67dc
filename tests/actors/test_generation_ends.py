"""How a generation worker ends: with a dead engine, when it is told to stop, and what it says of groups that fail."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from millrace.actors import generation
from millrace.actors.engines import wiring
from millrace.core.errors import EngineDeadError, EngineError
from millrace.core.protocols import Proof, Sampling, WeightHandle
from millrace.core.types import Ints, Rollout
from tests.actors.test_generation import Held, World, closes, running, until


class Mortal(Held):
    """An engine that dies when the test says so, or hangs where it says."""

    def __init__(self, *, hangs: str = "") -> None:
        super().__init__()
        self.hangs = hangs
        self.entered = asyncio.Event()
        self.dead = asyncio.Event()

    def die(self) -> None:
        self.dead.set()
        for call in self.calls.values():
            call.set_exception(EngineDeadError("process 7 has ended"))

    async def watch(self) -> None:
        await self.dead.wait()
        raise EngineDeadError("idle: process 7 has ended")

    async def hang(self, where: str) -> None:
        if self.hangs == where:
            self.entered.set()
            await asyncio.Event().wait()

    async def load(self, weights: WeightHandle, *, prove: bool) -> Proof:
        await self.hang("load")
        return await super().load(weights, prove=prove)

    async def abort(self, key: str) -> None:
        await self.hang("abort")
        await super().abort(key)


def test_a_dead_engine_ends_the_worker_and_blames_no_group(tmp_path: Path) -> None:
    async def scenario() -> Mapping[str, int]:
        world = World(tmp_path, max_lag=100)
        engine = Mortal()
        worker = world.worker(engine=engine, prefetch=0)
        await world.start()
        task = asyncio.create_task(worker.run())
        await until(lambda: len(engine.calls) == 4)
        engine.die()
        with pytest.raises(EngineDeadError, match="process 7 has ended"):
            await task
        assert not worker._heart._thread.is_alive()
        return (await world.queue.status()).calls

    calls = asyncio.run(scenario())
    assert calls.get("fail_groups", 0) == calls.get("put_groups", 0) == calls.get("leave", 0) == 0


@pytest.mark.parametrize("phase", ["no weights yet", "loading"])
def test_a_dead_engine_is_noticed_without_a_request_that_fails(tmp_path: Path, phase: str) -> None:
    async def scenario() -> None:
        world = World(tmp_path, max_lag=100)
        engine = Mortal(hangs="load")
        worker = world.worker(engine=engine)
        if phase == "loading":
            await world.start()
        task = asyncio.create_task(worker.run())
        await until(lambda: world.queue._calls["heartbeat"] > 1)
        if phase == "loading":
            await engine.entered.wait()
        engine.die()
        with pytest.raises(EngineDeadError, match="idle: process 7 has ended"):
            await task

    asyncio.run(scenario())


class Stuck:
    """A queue of which one method never answers."""

    def __init__(self, home: Any, method: str) -> None:
        self.home, self.method = home, method
        self.entered = asyncio.Event()

    def __getattr__(self, method: str) -> Callable[..., Any]:
        if method != self.method:
            return getattr(self.home, method)  # type: ignore[no-any-return]

        async def never(*args: Any, **kwargs: Any) -> None:
            self.entered.set()
            await asyncio.Event().wait()

        return never


@pytest.mark.parametrize("phase", ["wiring", "join", "load", "generating", "abort", "put_groups", "leave"])
def test_it_leaves_in_every_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str) -> None:
    """What hangs never answers: without a limit of its own the worker would stay for ever."""
    monkeypatch.setattr(generation, "GIVE_UP_S", 0.2)
    monkeypatch.setattr(generation, "LEAVE_S", 0.1)

    async def scenario() -> Mapping[str, Any]:
        world = World(tmp_path, max_lag=100)
        engine = Mortal(hangs=phase)
        stuck = world.home = Stuck(world.home, phase)  # type: ignore[assignment]
        entered = engine.entered if phase in ("load", "abort") else stuck.entered
        worker = world.worker(engine=engine, prefetch=0, linger_s=0)
        if phase == "wiring":

            async def never(*args: Any, **kwargs: Any) -> None:
                entered.set()
                await asyncio.Event().wait()

            monkeypatch.setattr(wiring, "check_wiring", never)
            worker._to_check = {"name": "vllm", "model": "m"}
        await world.start()
        task = asyncio.create_task(worker.run())
        if phase in ("generating", "abort", "put_groups", "leave"):
            await until(lambda: len(engine.calls) == 4)
        else:
            await entered.wait()
        if phase == "put_groups":
            engine.finish("draw 0 attempt 0")
            await entered.wait()
        await worker.stop()
        async with asyncio.timeout(20):
            await task
        assert phase in ("wiring", "join") or not worker._heart._thread.is_alive()
        return (await world.queue.status()).calls

    calls = asyncio.run(scenario())
    told = phase in ("load", "generating", "abort", "put_groups")  # nobody to tell, or nobody who answers
    assert calls.get("leave", 0) == told


def test_stopping_in_order_waits_for_no_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "GIVE_UP_S", 3600)

    async def scenario() -> None:
        world = World(tmp_path, max_lag=100)
        engine = Held()
        await world.start()
        async with running(world.worker(engine=engine, prefetch=0)):
            await until(lambda: len(engine.calls) == 4)
        status = await world.queue.status()
        closes(status)
        assert status.tokens["in_flight"] == 0

    asyncio.run(scenario())


def test_a_group_that_fails_is_told_with_its_traceback(tmp_path: Path) -> None:
    async def scenario() -> Any:
        world = World(tmp_path, max_lag=100, attempts=1)
        engine = Held()
        engine.failing = {"draw 1 attempt 0"}
        async with running(world.worker(engine=engine, prefetch=0)):
            await world.start()
            await until(lambda: "draw 4 attempt 0" in engine.calls)  # leased into the room of draw 1
        return await world.queue.quarantined(after=0)

    (dead,) = asyncio.run(scenario())
    assert (dead.draw, dead.attempt, dead.prompt, dead.cause) == (1, 0, "p1", "engine")
    assert dead.traceback.rstrip().endswith("EngineError: sample 'draw 1 attempt 0': out of memory")
    assert "in sample" in dead.traceback


class Wordy(Held):
    async def sample(self, tokens_P: Ints, *, sampling: Sampling, seeds: Sequence[int], key: str) -> Sequence[Rollout]:
        if key.startswith("draw 0 "):
            raise EngineError("ä" * 10_000 + " the end")
        return await super().sample(tokens_P, sampling=sampling, seeds=seeds, key=key)


def test_a_long_traceback_keeps_its_end(tmp_path: Path) -> None:
    async def scenario() -> Any:
        world = World(tmp_path, max_lag=100, attempts=1)
        engine = Wordy()
        async with running(world.worker(engine=engine, prefetch=0)):
            await world.start()
            await until(lambda: "draw 4 attempt 0" in engine.calls)
        return await world.queue.quarantined(after=0)

    (dead,) = asyncio.run(scenario())
    assert len(dead.traceback.encode()) <= 4096
    assert dead.traceback.rstrip().endswith("the end")


class Blind(Held):
    """Its logits are no numbers on one prompt."""

    async def sample(self, tokens_P: Ints, *, sampling: Sampling, seeds: Sequence[int], key: str) -> Sequence[Rollout]:
        rollouts = await super().sample(tokens_P, sampling=sampling, seeds=seeds, key=key)
        if key.startswith("draw 0 "):
            rollouts[0].behaviour_logprob_T[-1] = np.nan
        return rollouts


def test_a_log_probability_that_is_no_number_fails_the_group(tmp_path: Path) -> None:
    async def scenario() -> Any:
        world = World(tmp_path, max_lag=100, attempts=1)
        engine = Blind()
        async with running(world.worker(engine=engine, prefetch=0)):
            await world.start()
            await until(lambda: len(engine.calls) == 4)
            engine.finish("draw 0 attempt 0")
            await until(lambda: "draw 4 attempt 0" in engine.calls)
        return await world.queue.quarantined(after=0), await world.queue.status()

    (dead,), status = asyncio.run(scenario())
    assert dead.cause == "engine"
    assert "token 0 of 1 has log-probability nan" in dead.traceback
    closes(status)
