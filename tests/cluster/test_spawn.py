"""A handle means the same wherever its component lives."""

import asyncio
import gc
import os
import signal
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import ray
from ray import cloudpickle
from ray.exceptions import OutOfMemoryError, WorkerCrashedError

from millrace.cluster.process import HOLDING_COLLECTED_AT
from millrace.cluster.spawn import Gone, Handle, OnRay, Spawn, here
from millrace.core.calls import persist
from millrace.core.errors import ConfigError, Fenced, ModelError
from millrace.rewards.worker import RewardWorker


class Counter:
    def __init__(self, start: int) -> None:
        self.value = start
        self.event = asyncio.Event()

    async def add(self, much: int) -> int:
        self.value += much
        self.event.set()
        return self.value

    async def wait(self) -> str:
        await self.event.wait()
        return "woken"

    async def forever(self) -> None:
        await asyncio.Event().wait()

    async def refuse(self) -> None:
        raise Fenced("draw 3 is held by generation-1")

    async def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Holder:
    HOLDS_MANY = True

    async def collects(self) -> tuple[bool, int]:
        """Whether what was there before it is left out of collections, and how often there are any."""
        return gc.get_freeze_count() > 0, gc.get_threshold()[0]


class Stillborn:
    def __init__(self) -> None:
        raise ModelError("model nowhere: no such directory")

    async def run(self) -> None:
        pass


class Prepared:
    imported = 0  # in this process

    def __init__(self, other: Handle | None) -> None:
        self.found = Prepared.imported
        self.other = other

    async def prepared(self) -> int:
        """How often, when it was made."""
        return self.found

    async def add(self, much: int) -> int:
        assert self.other is not None
        return int(await self.other.add(much))


def prepare(well: bool) -> None:
    Prepared.imported += 1
    if not well:
        raise ModelError("its package does not import here")


class Relay:
    def __init__(self, other: Handle) -> None:
        self.other = other

    async def add(self, much: int) -> int:
        return int(await self.other.add(much))


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
    yield
    ray.shutdown()


async def use(spawn: Spawn) -> None:
    counter = spawn(Counter, 1, name="counter")
    waiting = asyncio.ensure_future(counter.wait())
    relay = spawn(Relay, counter, name="relay")
    assert await relay.add(2) == 3
    assert await waiting == "woken"
    with pytest.raises(Fenced, match="draw 3 is held"):
        await counter.refuse()


def test_components_in_this_process() -> None:
    asyncio.run(use(here))


def test_a_call_from_another_threads_loop_runs_on_the_components_own() -> None:
    async def main() -> str:
        counter = here(Counter, 0, name="counter")
        waiting = asyncio.ensure_future(counter.wait())
        thread = threading.Thread(target=lambda: asyncio.run(counter.add(5)))
        thread.start()
        result = str(await asyncio.wait_for(waiting, 5))
        thread.join()
        return result

    assert asyncio.run(main()) == "woken"


@pytest.mark.ray
def test_components_on_ray(cluster: None) -> None:
    spawn = OnRay()
    asyncio.run(use(spawn))
    spawn.kill()


@pytest.mark.ray
def test_a_process_that_was_started_ahead_gets_its_component_when_it_is_spawned(cluster: None) -> None:
    async def main() -> None:
        spawn = OnRay()
        spawn.ahead(Prepared, partial(prepare, True), name="generation-0")
        handle = spawn(Prepared, spawn(Counter, 1, name="counter"), name="generation-0")
        assert (await handle.prepared(), await handle.add(2)) == (1, 3)
        first = (await handle.whereabouts())[1]
        again = spawn(Prepared, handle, name="generation-0")  # a restart is a process of its own, as ever
        assert await again.prepared() == 0
        assert (await again.whereabouts())[1] != first
        spawn.kill()

    asyncio.run(main())


@pytest.mark.ray
def test_what_keeps_one_that_was_started_ahead_from_being_made_arrives_as_ever(cluster: None) -> None:
    async def main() -> None:
        spawn = OnRay()
        spawn.ahead(Stillborn, partial(prepare, True), name="generation-0")
        with pytest.raises(ConnectionError, match="generation-0 could not be started: .*ModelError: model nowhere"):
            await spawn(Stillborn, name="generation-0").run()
        spawn.ahead(Prepared, partial(prepare, False), name="generation-0")
        assert await spawn(Prepared, None, name="generation-0").prepared() == 1  # it may import well the second time
        spawn.ahead(Counter, partial(prepare, True), name="generation-1")
        spawn.end("generation-1")
        assert await spawn(Counter, 1, name="generation-1").add(1) == 2
        spawn.kill()

    asyncio.run(main())


@pytest.mark.ray
def test_the_class_itself_is_left_as_it_was(cluster: None) -> None:
    before = dict(vars(Counter))
    spawn = OnRay()
    assert asyncio.run(spawn(Counter, 1, name="counter").add(1)) == 2
    spawn.kill()
    assert dict(vars(Counter)) == before


@pytest.mark.ray
def test_a_dead_component_is_named_with_its_cause(cluster: None) -> None:
    async def main() -> None:
        spawn = OnRay()
        with pytest.raises(ConnectionError, match="reward-0 could not be started: .*ModelError: model nowhere"):
            await spawn(Stillborn, name="reward-0").run()
        with pytest.raises(ConnectionError, match="queue is gone: its process was killed, or crashed"):
            await spawn(Counter, 0, name="queue").die()

    asyncio.run(main())


class Ways(Handle):
    """Notes which methods went by Ray."""

    def __init__(self, handle: Handle) -> None:
        super().__init__(handle._actor, handle._name, near=True)
        self.by_ray: list[str] = []

    async def _by_ray(self, method: str, args: Any, kwargs: Any) -> Any:
        self.by_ray.append(method)
        return await super()._by_ray(method, args, kwargs)


@pytest.mark.ray
def test_a_component_that_lasts_is_called_past_ray_before_and_after_it_was_killed(cluster: None) -> None:
    async def main() -> None:
        spawn = OnRay()
        handle = spawn(Counter, 1, name="queue", lasting=True)
        ways, copy = Ways(handle), cloudpickle.loads(cloudpickle.dumps(handle))
        assert [await ways.add(1), await ways.add(1), await copy.add(1)] == [2, 3, 4]
        assert ways.by_ray == ["door"]
        first = (await ways.whereabouts())[1]
        calls = [asyncio.ensure_future(each) for each in (ways.forever(), copy.forever())]
        await asyncio.sleep(0.2)
        os.kill(first, signal.SIGKILL)
        for call in calls:
            with pytest.raises(Gone, match="queue is gone: its process was killed, or crashed"):
                await call
        assert await persist(lambda: ways.add(1), what="test", remedy="", deadline_s=30) == 2
        assert (await ways.whereabouts())[1] != first
        assert set(ways.by_ray) == {"door"}
        spawn.kill()

    asyncio.run(main())


@pytest.mark.ray
def test_the_process_of_one_that_holds_much_looks_for_garbage_rarely(cluster: None) -> None:
    async def main() -> None:
        spawn = OnRay()
        assert await spawn(Holder, name="reward-0").collects() == (True, HOLDING_COLLECTED_AT[0])
        spawn.kill()

    before = gc.get_freeze_count(), gc.get_threshold()
    asyncio.run(main())
    assert (gc.get_freeze_count(), gc.get_threshold()) == before, "a process that it shares is left as it is"
    assert RewardWorker.HOLDS_MANY


@pytest.mark.ray
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            OutOfMemoryError("2 worker(s) were killed due to low memory.\nMemory on"),
            "out of memory: 2 ",
        ),
        (WorkerCrashedError(), "died unexpectedly"),
    ],
    ids=["out of memory", "crashed"],
)
def test_a_process_that_ray_or_the_system_ended_is_gone(error: Exception, reason: str) -> None:
    """What is gone is restarted; any other error would end the run."""

    class Actor:
        class call:
            @staticmethod
            async def remote(*request: object) -> None:
                raise error

    async def scenario() -> None:
        await Handle(Actor(), "learner").work()

    with pytest.raises(Gone, match=f"learner is gone: .*{reason}"):
        asyncio.run(scenario())


def test_more_gpus_than_there_are_is_refused_before_anything_starts(cluster: None) -> None:
    with pytest.raises(ConfigError, match="generation-0 asks for 2 GPUs, but the Ray cluster has 0"):
        OnRay()(Counter, 0, name="generation-0", gpus=2)
