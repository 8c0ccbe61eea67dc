"""Processes are found, named and added up."""

import subprocess
import sys

import psutil
import pytest

from benchmarks import memory


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["ray::GenerationWorker.run"], "GenerationWorker"),
        (["ray::IDLE"], "IDLE"),
        (["/a/ray/core/src/ray/gcs/gcs_server", "--log"], "gcs_server"),
        (["/a/python", "-u", "/b/ray/dashboard/agent.py", "--x"], "agent.py"),
        (["python", "-m", "millrace", "train", "run.toml"], "millrace"),
        ([], "(ended)"),
    ],
)
def test_a_process_is_named_by_its_command(command: list[str], name: str) -> None:
    assert memory.name_of(command) == name


def test_processes_of_one_name_are_added() -> None:
    found = memory.grouped({"idle 1": 2**30, "idle 2": 2**29, "queue 3": 2**31})
    assert list(found.items()) == [("queue", (1, 2.0)), ("idle", (2, 1.5))]


def test_a_child_process_counts_with_its_memory() -> None:
    program = "import sys; held = bytearray(b'x' * (64 << 20)); print('up', flush=True); sys.stdin.read()"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {program!r}])"
    before = sum(memory.snapshot(psutil.Process()).values())
    run = subprocess.Popen([sys.executable, "-c", outer], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert run.stdout and run.stdin
    try:
        assert run.stdout.readline() == b"up\n"
        during = memory.snapshot(psutil.Process())
        assert sum(during.values()) - before > 64 << 20
        assert len(memory.snapshot(psutil.Process(run.pid))) == 2
    finally:
        run.stdin.close()
        run.wait(timeout=30)
