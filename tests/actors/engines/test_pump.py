"""The pump, over a core of three lines: handing over, finishing, failing, closing."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest

from millrace.actors.engines.pump import Call, Pump, Response
from millrace.core.errors import EngineDeadError, EngineError, WeightsError
from millrace.core.protocols import Sampling

PROMPT = np.array([1], np.int32)


class Counting:
    """Token k of every response is k. Fails at the step it is told to."""

    vocabulary = 100

    def __init__(self) -> None:
        self.rows: list[Response] = []
        self.threads = {threading.get_ident()}
        self.fail_at = -1
        self.steps = 0
        self.error: BaseException = ZeroDivisionError("the kernel is gone")
        self.closed = False
        self.version = 0

    @property
    def busy(self) -> bool:
        return bool(self.rows) or self.fail_at == self.steps

    def add(self, call: Call) -> None:
        self.threads.add(threading.get_ident())
        self.rows.extend(call.responses)
        if call.prompt == [13]:
            raise OverflowError("13 does not fit")

    def abort(self, responses: Sequence[Response]) -> None:
        gone = {response.number for response in responses}
        self.rows = [row for row in self.rows if row.number not in gone]

    def step(self) -> Sequence[Response]:
        self.threads.add(threading.get_ident())
        if self.steps == self.fail_at:
            raise self.error
        self.steps += 1
        for row in self.rows:
            row.append(len(row.tokens), -0.5, self.version)
            row.finish_if_done()
        finished = [row for row in self.rows if row.finish_reason]
        self.rows = [row for row in self.rows if not row.finish_reason]
        return finished

    def close(self) -> None:
        self.closed = True


def run(work: Callable[[Pump[Counting]], Any]) -> Pump[Counting]:
    pump = Pump(Counting, name="counting", max_model_len=100_000_000)

    async def whole() -> None:
        try:
            await asyncio.wait_for(work(pump), 20)
        finally:
            await pump.close()

    asyncio.run(whole())
    return pump


def test_many_calls_at_once_all_come_back() -> None:
    async def work(pump: Pump[Counting]) -> None:
        async def one(number: int) -> None:
            await asyncio.sleep(0.0001 * (number % 7))  # some arrive while it runs, some just as it falls asleep
            sampling = Sampling(max_tokens=1 + number % 5)
            rollouts = await pump.sample(PROMPT, sampling=sampling, seeds=[number, 0], key=str(number))
            assert [rollout.tokens_T.tolist() for rollout in rollouts] == [list(range(1 + number % 5))] * 2
            assert [rollout.seed for rollout in rollouts] == [number, 0]

        await asyncio.gather(*(one(number) for number in range(300)))
        assert not pump.progress()

    assert len(run(work).core.threads) == 1


def test_no_seeds_no_rollouts() -> None:
    async def work(pump: Pump[Counting]) -> None:
        assert await pump.sample(PROMPT, sampling=Sampling(max_tokens=1), seeds=[], key="none") == ()

    run(work)


def test_version_changes_only_between_steps_and_are_recorded() -> None:
    async def work(pump: Pump[Counting]) -> None:
        sampling = Sampling(max_tokens=200_000)
        running = asyncio.create_task(pump.sample(PROMPT, sampling=sampling, seeds=[1], key="long"))
        for version in (1, 2):
            await asyncio.sleep(0.01)
            await pump.between(lambda version=version: setattr(pump.core, "version", version))  # type: ignore[misc]
        (rollout,) = await running
        assert [run.version for run in rollout.versions] == [0, 1, 2]
        assert rollout.version_T().tolist() == sorted(rollout.version_T().tolist())
        assert len(rollout.version_T()) == 200_000

    run(work)


def test_a_failing_step_fails_everyone_who_waits_and_all_later_calls() -> None:
    async def work(pump: Pump[Counting]) -> None:
        never: Future[int] = Future()
        sampling = Sampling(max_tokens=10_000_000)
        waiting = [
            asyncio.create_task(pump.sample(PROMPT, sampling=sampling, seeds=[1], key="a")),
            asyncio.create_task(pump.sample(PROMPT, sampling=sampling, seeds=[2], key="b")),
            asyncio.create_task(pump.answered(lambda: never)),
            asyncio.create_task(pump.watch()),
        ]
        await asyncio.sleep(0.01)
        await pump.between(lambda: setattr(pump.core, "fail_at", pump.core.steps))
        for task in waiting:
            with pytest.raises(
                EngineDeadError, match="counting engine: a step raised ZeroDivisionError: the kernel is gone"
            ):
                await task
        with pytest.raises(EngineDeadError, match="the kernel is gone"):
            await pump.watch()
        with pytest.raises(EngineDeadError, match="sample 'late': .*the kernel is gone"):
            await pump.sample(PROMPT, sampling=sampling, seeds=[1], key="late")
        with pytest.raises(EngineDeadError, match="the kernel is gone"):
            await pump.between(lambda: None)

    run(work)


def test_a_step_that_ends_the_thread_ends_the_engine() -> None:
    async def work(pump: Pump[Counting]) -> None:
        pump.core.error = SystemExit("a library gave up")
        watching = asyncio.create_task(pump.watch())
        running = asyncio.create_task(pump.sample(PROMPT, sampling=Sampling(max_tokens=10_000_000), seeds=[1], key="a"))
        await asyncio.sleep(0.01)
        await pump.between(lambda: setattr(pump.core, "fail_at", pump.core.steps))
        for task in (watching, running):
            with pytest.raises(EngineDeadError, match="SystemExit: a library gave up"):
                await task

    run(work)


def test_a_call_that_the_core_refuses_fails_alone() -> None:
    async def work(pump: Pump[Counting]) -> None:
        sampling = Sampling(max_tokens=100)
        beside = asyncio.create_task(pump.sample(PROMPT, sampling=sampling, seeds=[1], key="beside"))
        with pytest.raises(EngineError, match="sample 'bad': the counting engine raised OverflowError: 13 does") as bad:
            await pump.sample(np.array([13], np.int32), sampling=sampling, seeds=[1, 2], key="bad")
        assert not isinstance(bad.value, EngineDeadError)
        (rollout,) = await beside
        assert len(rollout) == 100
        assert pump.core.rows == []
        assert pump.aborted == 0

    run(work)


def test_failing_work_between_steps_fails_its_caller_only() -> None:
    async def work(pump: Pump[Counting]) -> None:
        def refuse() -> None:
            raise WeightsError("version 3: other bytes")

        with pytest.raises(WeightsError, match="version 3: other bytes"):
            await pump.between(refuse)
        with pytest.raises(EngineError, match="counting engine raised ZeroDivisionError"):
            await pump.between(lambda: 1 / 0)
        (rollout,) = await pump.sample(PROMPT, sampling=Sampling(max_tokens=3), seeds=[1], key="after")
        assert len(rollout) == 3

    run(work)


def test_close_gives_up_what_runs() -> None:
    async def work(pump: Pump[Counting]) -> None:
        sampling = Sampling(max_tokens=10_000_000)
        running = asyncio.create_task(pump.sample(PROMPT, sampling=sampling, seeds=[1], key="a"))
        await asyncio.sleep(0.01)
        await pump.close()
        with pytest.raises(EngineError, match="'a' was aborted after"):
            await running
        with pytest.raises(EngineError, match="it was closed"):
            await pump.sample(PROMPT, sampling=sampling, seeds=[1], key="late")

    assert run(work).core.closed


def test_a_core_that_does_not_start_says_why() -> None:
    def fail() -> Counting:
        raise OSError("no such device")

    with pytest.raises(EngineError, match="counting engine: its start raised OSError: no such device"):
        Pump(fail, name="counting", max_model_len=8)
