"""The supervisor over components that die, hang and raise; processes are played by fakes."""

import asyncio
import time
from types import SimpleNamespace

import pytest

from millrace.cluster.spawn import Gone, Handle
from millrace.cluster.supervise import supervisor as module
from millrace.cluster.supervise.config import SuperviseConfig
from millrace.cluster.supervise.policy import Vital
from millrace.cluster.supervise.supervisor import Supervisor
from millrace.core.errors import ComponentLost, EngineDeadError, RewardError, UserCodeError, WeightsError
from millrace.core.types import GroupId

FAST = SuperviseConfig(hang_s=0.3, busy_s=5, restarts=6, backoff_s=0.001)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "PING_S", 0.01)
    monkeypatch.setattr(module, "LOOK_S", 0.05)


class Process(Handle):
    """One incarnation: `life` says how its run goes; while `frozen` it answers nothing."""

    def __init__(self, name, number, life):
        self._name, self.number, self._life = name, number, life
        self.frozen, self.dead = False, asyncio.Event()

    async def run(self):
        killed = asyncio.ensure_future(self.dead.wait())
        living = asyncio.ensure_future(self._life(self))
        await asyncio.wait({killed, living}, return_when=asyncio.FIRST_COMPLETED)
        if killed.done():
            living.cancel()
            raise Gone(self._name, "signal 9")
        return living.result()

    async def whereabouts(self):
        while self.frozen and not self.dead.is_set():
            await asyncio.sleep(0.005)
        if self.dead.is_set():
            raise Gone(self._name, "signal 9")
        return "node", self.number


class World:
    """A supervisor, what it told, and the processes it made."""

    def __init__(self, life, *, config=FAST, name="generation-0"):
        self.oom_kills = 4
        self.queue_answers = asyncio.Event()
        self.queue_answers.set()
        self.processes, self.told, self.said, self.fenced, self.lost, self.ended = [], [], [], [], [], []

        def make():
            self.processes.append(Process(name, len(self.processes) + 1, life))
            return self.processes[-1]

        class Queue:
            async def fence(_, worker, *, cause, traceback):
                await self.queue_answers.wait()
                self.fenced.append((worker, cause))
                return [GroupId(3, 0)]

        async def lost(component):
            self.lost.append(component)

        class Nurse:
            async def look(_, pid):
                return Vital(True, 1.0)

            async def oom_kills(_):
                return self.oom_kills

            async def end(_, pid):
                self.ended.append(pid)
                self.processes[pid - 1].dead.set()

        self.nurse = Nurse
        spawn = SimpleNamespace(end=lambda name: None, nurse=lambda node: Nurse())
        self.supervisor = Supervisor(
            config,
            spawn=spawn,
            queue=Queue(),
            lasting={},
            makers={name: make},
            tell=lambda kind, **facts: self.told.append({"kind": kind, **facts}),
            say=self.said.append,
            lost=lost,
        )
        self.name = name

    async def run(self, *, while_running=None):
        tasks = self.supervisor.start()
        if while_running is not None:
            await while_running(self)
        await asyncio.wait_for(tasks[self.name], 10)

    def kinds(self):
        return [each["kind"] for each in self.told]


async def until(condition):
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


async def second_one_ends(process):
    if process.number == 1:
        await asyncio.sleep(60)


def test_one_that_is_killed_is_made_anew_and_its_leases_end_at_once():
    async def kill(world):
        await until(lambda: world.supervisor.components["generation-0"].state == "serving")
        world.processes[0].dead.set()
        await until(lambda: world.supervisor.components["generation-0"].state == "left")

    world = World(second_one_ends)
    asyncio.run(world.run(while_running=kill))
    assert len(world.processes) == 2
    assert world.fenced == [("generation-0", "crashed")]
    assert world.kinds()[:2] == ["lost", "restarting"]
    assert world.told[0]["holds"] == ["3/0"]
    assert world.lost == ["generation-0"]
    assert "restart 1 of 6" in world.said[0] and "signal 9" in world.said[0]


def test_the_cause_says_that_memory_ran_out():
    async def kill(world):
        await until(lambda: world.supervisor.components["generation-0"].state == "serving")
        world.oom_kills += 1
        world.processes[0].dead.set()
        await until(lambda: world.supervisor.components["generation-0"].state == "left")

    world = World(second_one_ends)
    asyncio.run(world.run(while_running=kill))
    assert "ran out of memory, and the system ended 1 of its processes" in world.told[0]["cause"]
    assert "generation.slots" in world.said[0]


def test_one_that_freezes_is_ended_and_made_anew():
    async def freeze(world):
        await until(lambda: world.supervisor.components["generation-0"].pid == 1)
        world.processes[0].frozen = True
        await until(lambda: len(world.processes) == 2)

    world = World(second_one_ends)
    asyncio.run(world.run(while_running=freeze))
    assert world.ended == [1]
    assert world.fenced == [("generation-0", "hung")]
    assert "SIGSTOP" in world.told[0]["cause"]


def test_a_dead_engine_is_a_loss_of_its_worker():
    async def life(process):
        if process.number < 3:
            raise EngineDeadError("the engine's process has ended")

    world = World(life)
    asyncio.run(world.run())
    assert len(world.processes) == 3
    assert [kind for kind in world.kinds() if kind != "serving"] == ["lost", "restarting", "lost", "restarting"]


def test_the_budget_ends_the_run_with_what_to_do():
    async def life(process):
        raise EngineDeadError("the engine's process has ended")

    world = World(life)
    words = r"after 6 restarts, and no restart is left of the 6 within.*supervise\.restarts.*engine's process.*--resume"
    with pytest.raises(ComponentLost, match=words):
        asyncio.run(world.run())
    assert len(world.processes) == 7
    assert world.kinds()[-1] == "given up"


def test_without_restarts_the_first_loss_ends_the_run_and_says_so():
    async def life(process):
        raise EngineDeadError("the engine's process has ended")

    world = World(life, config=SuperviseConfig(restarts=0))
    with pytest.raises(ComponentLost, match=r"was lost, and no restart is left of the 0 within 600 s"):
        asyncio.run(world.run())
    assert len(world.processes) == 1
    assert world.supervisor.incident.endswith("given up")


def test_what_cannot_be_constructed_ends_the_run_at_its_first_start():
    async def life(process):
        raise ConnectionRefusedError("generation-0 could not be started: no such model")

    world = World(life)
    with pytest.raises(ComponentLost, match="no such model"):
        asyncio.run(world.run())
    assert len(world.processes) == 1


def test_what_cannot_be_constructed_after_a_loss_is_tried_again():
    async def life(process):
        if process.number == 1:
            raise EngineDeadError("the engine's process has ended")
        if process.number < 4:  # the memory of the first is not free yet
            raise ConnectionRefusedError("generation-0 could not be started: no memory")

    world = World(life)
    asyncio.run(world.run())
    assert len(world.processes) == 4


def test_an_error_that_nobody_expected_is_tried_again_and_then_ends_the_run_as_it_is():
    async def life(process):
        raise OSError("CUDA error: unspecified launch failure")

    world = World(life)
    with pytest.raises(UserCodeError, match="CUDA error"):
        asyncio.run(world.run())
    assert len(world.processes) == 2


@pytest.mark.parametrize("failure", ["she is gone", "she hangs"])
def test_a_nurse_that_does_not_answer_ends_nobody(failure, monkeypatch):
    monkeypatch.setattr(module, "LOOK_S", 0.02)

    async def freeze(world):
        async def no_answer(self, *args):
            if failure == "she hangs":
                await asyncio.Event().wait()
            raise Gone("the nurse", "its node died")

        for what in ("look", "end", "oom_kills"):
            monkeypatch.setattr(world.nurse, what, no_answer)
        await until(lambda: world.supervisor.components["generation-0"].pid == 1)
        world.processes[0].frozen = True
        await until(lambda: len(world.processes) == 2)

    world = World(second_one_ends, config=SuperviseConfig(hang_s=0.1, busy_s=0.3, backoff_s=0.001))
    asyncio.run(world.run(while_running=freeze))
    assert "nobody there can see its process" in world.told[0]["cause"]


def test_a_loss_shows_while_its_leases_are_still_being_ended():
    async def kill(world):
        component = world.supervisor.components["generation-0"]
        await until(lambda: component.state == "serving")
        world.queue_answers.clear()
        world.processes[0].dead.set()
        await until(lambda: component.state == "restarting")
        assert len(world.processes) == 1
        world.queue_answers.set()

    world = World(second_one_ends)
    asyncio.run(world.run(while_running=kill))
    assert len(world.processes) == 2


def test_wrong_weights_are_tried_again_once_not_ten_times():
    async def life(process):
        raise WeightsError("version 3: wrong digest")

    world = World(life)
    with pytest.raises(WeightsError, match="wrong digest"):
        asyncio.run(world.run())
    assert len(world.processes) == 2


def test_an_error_that_no_restart_mends_ends_the_run_as_it_is():
    async def life(process):
        raise RewardError("the verifier fails")

    world = World(life)
    with pytest.raises(RewardError, match="the verifier fails"):
        asyncio.run(world.run())
    assert len(world.processes) == 1
    assert world.fenced == []


def test_what_is_lost_while_the_run_ends_is_not_made_anew():
    async def kill(world):
        await until(lambda: world.supervisor.components["generation-0"].state == "serving")
        world.supervisor.ending = lambda name: True
        world.processes[0].dead.set()

    world = World(second_one_ends)
    asyncio.run(world.run(while_running=kill))
    assert len(world.processes) == 1
    assert world.kinds() == ["lost"]


def test_a_prompts_fault_takes_nothing_of_the_budget():
    async def life(process):
        if process.number < 20:
            process_world.supervisor.refund("generation-0")
            raise EngineDeadError("poisoned")

    process_world = World(life)
    asyncio.run(process_world.run())
    assert len(process_world.processes) == 20


def test_a_process_that_ray_replaced_between_two_pings_was_lost_all_the_same():
    world = World(second_one_ends, name="worker-0")
    store = Process("weights", 7, second_one_ends)

    async def replace_it(world):
        components = world.supervisor.components
        await until(lambda: components["weights"].pid == 7)
        store.number = 8
        await until(lambda: components["weights"].pid == 8 and components["weights"].state == "serving")
        world.processes[0].dead.set()

    world.supervisor._lasting["weights"] = world.supervisor._component("weights", lambda: store)
    asyncio.run(world.run(while_running=replace_it))
    told = [(each["kind"], each["pid"]) for each in world.told if each.get("component") == "weights" and "pid" in each]
    assert told == [("lost", 7), ("serving", 8)]


def test_one_that_starts_later_is_made_when_it_is_told_to_and_kept_in_being_from_then_on():
    async def scenario():
        world = World(second_one_ends, name="held-out")
        tasks = world.supervisor.start(later=["held-out"])
        await asyncio.sleep(0.05)
        assert world.processes == [] and world.supervisor["held-out"] is None
        assert world.supervisor.components["held-out"].state == "starting"
        world.supervisor.start_later()
        await until(lambda: world.supervisor.components["held-out"].state == "serving")
        world.processes[0].dead.set()
        await asyncio.wait_for(tasks["held-out"], 10)
        return world

    assert len(asyncio.run(scenario()).processes) == 2
