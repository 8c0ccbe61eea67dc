"""vLLM's processes die, or their owner does: noticed in every phase, and nothing is left."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from millrace.actors.engines.processes import SEGMENT, SEMAPHORE, _name, _segments, marked
from millrace.core.errors import EngineDeadError
from millrace.core.weights import mapped
from tests.actors.test_generation import World, until

NOTICED_S = 3.0
STOP_NOTICED_S = 10.0
GONE_S = 5.0

CASES = [
    pytest.param("generating", "VLLM::EngineCor", marks=pytest.mark.ray),
    pytest.param("idle", "VLLM::EngineCor", marks=pytest.mark.faults),
    pytest.param("idle", "VLLM::Worker", marks=pytest.mark.faults),
    pytest.param("loading", "VLLM::Worker", marks=pytest.mark.faults),
    pytest.param("stopped", "VLLM::EngineCor", marks=pytest.mark.faults),
]


@pytest.mark.parametrize(("phase", "victim"), CASES)
def test_the_worker_ends_when_one_of_its_engine_s_processes_does(
    build_case: Callable[..., Any], tmp_path: Path, phase: str, victim: str
) -> None:
    case = build_case("vllm_async")
    mark = case.engine._processes.mark
    pids = {_name(pid): pid for pid in marked(mark)}
    assert {"VLLM::EngineCor", "VLLM::Worker"} <= pids.keys()
    segments = {path for pid in pids.values() for path in _segments(pid, SEGMENT)}
    assert segments

    async def scenario() -> float:
        world = World(tmp_path, max_lag=100, steps=1000)

        async def publish(version: int, step: int) -> None:
            handle = case.publish()
            await world.store.publish(handle.manifest, mapped(handle))
            await world.queue.announce(version=version, epoch=world.epoch)

        world.publish = publish  # type: ignore[assignment,method-assign]  # of this engine's model
        worker = world.worker(engine=case.engine)
        running = asyncio.create_task(worker.run())
        if phase == "idle":
            await until(lambda: world.queue._calls["heartbeat"] > 2)
        if phase == "loading":
            await case.engine._prepared()
            os.kill(pids["VLLM::EngineCor"], signal.SIGSTOP)  # so that the load is under way for long enough
        if phase != "idle":
            await world.start()
        if phase == "loading":
            await until(lambda: case.engine._loading.locked())
        if phase in ("generating", "stopped"):
            await until(lambda: case.engine.generated > 100)
        began = time.monotonic()
        os.kill(pids[victim], signal.SIGSTOP if phase == "stopped" else signal.SIGKILL)
        async with asyncio.timeout(STOP_NOTICED_S if phase == "stopped" else NOTICED_S):
            with pytest.raises(EngineDeadError, match=f"process {pids[victim]} .{victim}. has") as caught:
                await running
        assert "start the worker again" in str(caught.value)
        assert (await world.queue.status()).calls.get("fail_groups", 0) == 0
        return time.monotonic() - began

    noticed_s = case.run(scenario)
    print(f"{phase}, {victim}: noticed after {noticed_s:.2f} s")
    deadline = time.monotonic() + GONE_S
    while marked(mark):  # they were killed before the worker was told, and take a moment to go
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not [path for path in segments if Path(path).exists()]
    asyncio.run(case.engine.close())


OWNER = """
import asyncio, sys
import numpy as np
from millrace.actors.engines import engine
from millrace.core.protocols import Sampling

async def main():
    built = engine("vllm_async", model=sys.argv[1], slots=4, max_model_len=64, kv_cache_gib=0.1)
    await built.sample(np.array([1, 2], np.int32), sampling=Sampling(max_tokens=2), seeds=[1], key="a")
    print("serving", flush=True)
    await asyncio.sleep(600)

if __name__ == "__main__":
    asyncio.run(main())
"""


def family(owner: int) -> dict[str, psutil.Process]:
    found = {}
    for child in psutil.Process(owner).children(recursive=True):
        try:
            line = " ".join(child.cmdline())
        except psutil.Error:  # it has just ended
            continue
        names = [
            name for name in ("EngineCore", "Worker", "resource_tracker", "processes.py", "spawn_main") if name in line
        ]
        found[names[0] if names else line] = child
    return found


@pytest.mark.parametrize(
    "phase",
    [pytest.param("serving", marks=pytest.mark.ray), pytest.param("starting", marks=pytest.mark.faults)],
)
def test_nothing_outlives_a_killed_owner(model_of: Callable[..., str], tmp_path: Path, phase: str) -> None:
    script = tmp_path / "owner.py"
    script.write_text(OWNER)
    before = set(os.listdir("/dev/shm"))
    owner = subprocess.Popen([sys.executable, str(script), model_of("qwen2", True)], stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout is not None
        if phase == "serving":
            assert owner.stdout.readline() == "serving\n"
            found = family(owner.pid)
            assert {"EngineCore", "Worker", "processes.py"} <= found.keys()
        else:
            while "spawn_main" not in (found := family(owner.pid)):
                time.sleep(0.01)
        segments = {path for process in found.values() for path in _segments(process.pid, SEGMENT, SEMAPHORE)}
    finally:
        owner.send_signal(signal.SIGKILL)
        owner.wait()
    _, alive = psutil.wait_procs(list(found.values()), timeout=GONE_S)
    for process in alive:
        process.kill()
    assert not alive
    assert not [path for path in segments if Path(path).exists()]
    assert phase == "starting" or segments
    assert {name for name in set(os.listdir("/dev/shm")) - before if f"/dev/shm/{name}" in segments} == set()
