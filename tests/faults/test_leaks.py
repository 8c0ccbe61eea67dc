"""The census of leaks finds what a run could leave behind."""

import subprocess
import sys
import time
from contextlib import suppress
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import pytest

from tests.faults.leaks import Census, nothing_left

# A daemon of a daemon, in a session of its own, whose parents have ended. It says its process id.
DAEMON = (
    "import os, socket, time\n"
    "if os.fork() == 0:\n"
    "    os.setsid()\n"
    "    if os.fork() == 0:\n"
    "        port = socket.create_server(('127.0.0.1', 0))\n"
    "        print(os.getpid(), port.getsockname()[1], flush=True)\n"
    "        os.close(1), time.sleep(1000)\n"
)


def test_nothing_is_found_where_nothing_is_left() -> None:
    with nothing_left(within_s=5) as census:
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        assert [each.pid for each in census.processes()] == [child.pid]
        child.communicate(b"\n")
    assert census.left() == []


def test_a_daemon_is_found_with_its_port_and_ended() -> None:
    pid = port = 0
    with pytest.raises(AssertionError, match="left behind after 0 s:\nprocess") as caught, nothing_left(within_s=0):
        said = subprocess.run([sys.executable, "-c", DAEMON], stdout=subprocess.PIPE, text=True, check=True).stdout
        pid, port = map(int, said.split())
    assert f"process {pid} of" in str(caught.value)
    assert f"ports [{port}]" in str(caught.value)
    until = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < until:
        time.sleep(0.01)
    assert not Path(f"/proc/{pid}").exists()


def test_shared_memory_is_ours_if_ours_used_it() -> None:
    code = "import mmap; file = open('/dev/shm/{}', 'r+b'); m = mmap.mmap(file.fileno(), 0); print(flush=True); input()"
    census = Census()
    memory = SharedMemory(create=True, size=4096)
    try:
        name = memory.name.lstrip("/")
        memory.close()
        assert census.shared() == []  # whoever made it, it was none of ours
        user = subprocess.Popen(
            [sys.executable, "-c", code.format(name)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert user.stdout is not None
        user.stdout.readline()
        assert Census().shared() == []  # it was there before
        assert census.shared() == [name]
        user.kill()
        user.communicate()
        with pytest.raises(AssertionError, match=f"left behind after 0 s:\n/dev/shm/{name}"):
            census.wait(within_s=0)
        assert census.left() == []
    finally:
        with suppress(FileNotFoundError):
            memory.unlink()
