"""The guard ends what a driver leaves behind, however the driver ended."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from millrace.cluster import guard
from millrace.cluster.run_directory import held, is_held, wait_for_remains
from tests.faults.leaks import nothing_left

WITHIN_S = 60.0

# A driver that holds a directory, with a child in a session of its own that has children, and shared memory.
DRIVER = """
import os, subprocess, sys, time
from contextlib import nullcontext
from pathlib import Path
from millrace.cluster.guard import MARK, guarded
from millrace.cluster.run_directory import held

CHILD = '''
import mmap, os, sys, subprocess, time
file = open("/dev/shm/" + sys.argv[1], "w+b"); file.truncate(4096); memory = mmap.mmap(file.fileno(), 4096)
bare = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], env={})
print("ready", flush=True); time.sleep(1000)
'''
with held(Path(sys.argv[1])) as lock, guarded(Path(sys.argv[1]), lock=lock, mark=os.environ.get(MARK)):
    child = subprocess.Popen([sys.executable, "-c", CHILD, sys.argv[2]], stdout=subprocess.PIPE, start_new_session=True)
    child.stdout.readline()
    if os.fork() == 0:
        time.sleep(1000)
    time.sleep(1.5)
    print(child.pid, flush=True)
    sys.stdin.readline()
"""


def until(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def started(directory: Path, name: str, *, mark: str | None) -> subprocess.Popen[bytes]:
    environment = os.environ if mark is None else {**os.environ, guard.MARK: mark}
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(directory), name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    )
    assert process.stdout is not None
    assert process.stdout.readline()
    return process


@pytest.mark.parametrize("killed", [True, False])
def test_nothing_of_a_driver_is_left_and_its_directory_is_held_until_then(tmp_path: Path, killed: bool) -> None:
    name = f"millrace-test-{os.getpid()}"
    with nothing_left(within_s=WITHIN_S):
        process = started(tmp_path, name, mark=guard.fresh_mark())
        assert (guard.SHARED / name).exists()
        if killed:
            process.kill()
        else:
            assert process.stdin is not None
            process.stdin.close()
        wait_for_remains(tmp_path)
        until(lambda: not is_held(tmp_path), "the end of the guard")
        assert not (guard.SHARED / name).exists()
        process.wait()


EARLY = """
import os, subprocess, sys
from pathlib import Path
from millrace.cluster import guard
from millrace.cluster.run_directory import held

mark = os.environ[guard.MARK]
guard.guard_early(mark)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], start_new_session=True)
with guard.guarded():  # Ray's, in a thread
    pass
if sys.argv[2] == "before":
    print(child.pid, flush=True)
    sys.stdin.readline()
    guard.end_early()
    os._exit(1)
with held(Path(sys.argv[1])) as lock, guard.guarded(Path(sys.argv[1]), lock=lock, mark=mark):
    print(child.pid, flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("phase", ["before", "within"])
@pytest.mark.parametrize("killed", [True, False])
def test_what_is_started_before_a_directory_is_held_ends_too(tmp_path: Path, phase: str, killed: bool) -> None:
    with nothing_left(within_s=WITHIN_S):
        process = subprocess.Popen(
            [sys.executable, "-c", EARLY, str(tmp_path), phase],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, guard.MARK: guard.fresh_mark()},
        )
        assert process.stdin is not None and process.stdout is not None
        child = int(process.stdout.readline())
        assert Path(f"/proc/{child}").exists()
        assert is_held(tmp_path) == (phase == "within")
        if killed:
            process.kill()
        else:
            process.stdin.close()
        process.wait()
        until(lambda: not Path(f"/proc/{child}").exists(), "the end of the child")
        until(lambda: not is_held(tmp_path), "the end of the guard")
        process.stdout.close()


def test_where_others_work_too_only_death_ends_what_was_started(tmp_path: Path) -> None:
    before = dict(os.environ)
    with held(tmp_path) as lock, guard.guarded(tmp_path, lock=lock):
        assert os.environ[guard.RUN] == str(tmp_path)
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        with guard.guarded():  # of the same process: it has its guard
            pass
    assert os.environ == before
    assert not is_held(tmp_path)
    assert child.poll() is None
    child.communicate(b"\n")
    assert child.returncode == 0
