"""Engines' processes: found by their mark, watched, and gone with their owner, however it ends."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from millrace.actors.engines import processes
from millrace.actors.engines.processes import Processes, marked, state

SLEEPER = "import time; time.sleep(600)"
PARENT = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {SLEEPER!r}]); time.sleep(600)"


def until(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def family() -> Iterator[Processes]:
    built = Processes()
    yield built
    built.close()


def test_a_mark_reaches_every_generation_and_nobody_else(family: Processes) -> None:
    with family.starting():
        parent = subprocess.Popen([sys.executable, "-c", PARENT])
    stranger = subprocess.Popen([sys.executable, "-c", SLEEPER])
    try:
        until(lambda: len(marked(family.mark)) == 2)
        assert parent.pid in marked(family.mark)
        assert os.getpid() not in marked(family.mark)
        family.close()
        assert parent.wait(10) == -signal.SIGKILL
        assert marked(family.mark) == []
        assert stranger.poll() is None
        assert family._guard.poll() is not None
    finally:
        stranger.kill()
        stranger.wait()


def test_one_end_is_told_by_name_and_ends_the_others(family: Processes) -> None:
    with family.starting():
        children = [subprocess.Popen([sys.executable, "-c", SLEEPER]) for _ in range(2)]
    until(lambda: len(marked(family.mark)) == 2)
    told: list[str] = []
    happened = threading.Event()
    family.watch(lambda what: (told.append(what), happened.set()))  # type: ignore[func-returns-value]
    children[0].kill()
    assert happened.wait(10)
    assert told == [f"process {children[0].pid} (python) has ended"]
    assert children[1].wait(10) == -signal.SIGKILL


def test_a_stopped_process_counts_as_gone(family: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "LOOK_S", 0.05)
    monkeypatch.setattr(processes, "STOPPED_S", 0.2)
    with family.starting():
        child = subprocess.Popen([sys.executable, "-c", SLEEPER])
    told: list[str] = []
    happened = threading.Event()
    until(lambda: marked(family.mark))
    family.watch(lambda what: (told.append(what), happened.set()))  # type: ignore[func-returns-value]
    child.send_signal(signal.SIGSTOP)
    assert happened.wait(10)
    assert "has been stopped for 0.2 s" in told[0]
    assert child.wait(10) == -signal.SIGKILL


def test_closing_tells_nobody(family: Processes) -> None:
    with family.starting():
        child = subprocess.Popen([sys.executable, "-c", SLEEPER])
    until(lambda: marked(family.mark))
    told: list[str] = []
    family.watch(told.append)
    family.close()
    child.wait(10)
    until(lambda: "engine-processes" not in [thread.name for thread in threading.enumerate()])
    assert told == []


OWNER = """
import json, subprocess, sys, time
from millrace.actors.engines.processes import Processes
family = Processes()
with family.starting():
    child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, text=True)
print(json.dumps({"child": child.pid, "guard": family._guard.pid, "segment": child.stdout.readline().strip()}))
sys.stdout.flush()
time.sleep(600)
"""
# Its resource tracker is killed with it, so that nobody but the guard cleans up.
HOLDER = """
import os, signal, time
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
segment = SharedMemory(create=True, size=4096)
print(segment._name, flush=True)
os.kill(resource_tracker._resource_tracker._pid, signal.SIGKILL)
time.sleep(600)
"""


def test_a_killed_owner_leaves_no_process_and_no_shared_memory() -> None:
    owner = subprocess.Popen([sys.executable, "-c", OWNER, HOLDER], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    found = json.loads(owner.stdout.readline())
    segment = Path("/dev/shm") / found["segment"].lstrip("/")
    assert segment.exists()
    assert state(found["child"]) not in "ZX"
    owner.kill()
    owner.wait()
    until(lambda: state(found["child"]) in "ZX" and state(found["guard"]) in "ZX")
    assert not segment.exists()
