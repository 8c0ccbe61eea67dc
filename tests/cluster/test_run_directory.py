"""What other processes see of a run: who holds it, and its lines as they come."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from millrace.cluster import run_directory
from millrace.cluster.record import Recorder
from millrace.cluster.run_directory import Tail, follow, held, is_held
from millrace.core.errors import ConfigError


def test_one_runs_in_a_directory_and_lets_go_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_directory, "GLANCE_S", 0.0)
    directory = tmp_path / "runs" / "a"
    assert not is_held(directory)
    with held(directory):
        assert is_held(directory)
        who = rf"{directory} is being run by process {os.getpid()} on .*millrace stop"
        with pytest.raises(ConfigError, match=who), held(directory):
            pass
        assert is_held(directory)
    assert not is_held(directory)
    with held(directory):
        pass


def test_whoever_looks_does_not_keep_a_run_from_starting(tmp_path: Path) -> None:
    looks = f"from pathlib import Path; from millrace.cluster.run_directory import is_held; d = Path({str(tmp_path)!r})"
    with subprocess.Popen([sys.executable, "-c", looks + "\nwhile True: is_held(d)"]) as looking:
        try:
            for _ in range(200):
                with held(tmp_path):
                    time.sleep(0.0005)
        finally:
            looking.kill()


def test_a_child_that_outlives_a_killed_run_does_not_hold_it(tmp_path: Path) -> None:
    code = (
        "import os, time; from pathlib import Path; from millrace.cluster.run_directory import held\n"
        f"with held(Path({str(tmp_path)!r})):\n"
        "    if os.fork(): os.kill(os.getpid(), 9)\n"
        "    print(os.getpid(), flush=True)\n"  # what a fork does to the lock is done by now
        "    time.sleep(1000)"
    )
    done = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert done.stdout is not None
    child = int(done.stdout.readline())
    try:
        done.wait()
        os.kill(child, 0)  # it lives
        assert not is_held(tmp_path)
    finally:
        os.kill(child, 9)
        done.stdout.close()


def test_a_torn_line_comes_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.read() == []
    path.write_bytes(b"one\ntw")
    assert tail.read() == [b"one"]
    assert tail.read() == []
    with path.open("ab") as file:
        file.write(b"o\n\nthree\n")
    assert tail.read() == [b"two", b"three"]
    tail.close()
    assert Tail(path, offset=4).read() == [b"two", b"three"]


def test_what_a_resumed_run_makes_again_comes_again_and_nothing_else_twice(tmp_path: Path) -> None:
    tail = Tail(tmp_path / "metrics.jsonl")

    def steps() -> list[int]:
        return [json.loads(line)["step"] for line in tail.read()]

    with Recorder(tmp_path) as record:
        for step in (1, 2, 3):
            record.metrics(step, {"reward/mean": 0.5})
        assert steps() == [1, 2, 3]
        record.metrics(4, {"reward/mean": 0.5})
    with Recorder(tmp_path) as record:
        record.rewind(2)
        record.metrics(3, {"reward/mean": 0.5})
        assert steps() == [4, 3]  # 4 was made before, and read late
        record.metrics(4, {"reward/mean": 0.5})
        assert steps() == [4]
        record.rewind(3)
        record.metrics(4, {"reward/mean": 0.5})
        assert steps() == [4]


def test_following_ends_with_the_run_and_misses_nothing_that_was_written_before(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_text("one\n")
    asked = []

    def ended() -> bool:
        """Between two looks, the last line is written and the run ends."""
        asked.append(1)
        if len(asked) == 2:
            with path.open("a") as file:
                file.write("two\n")
        return len(asked) == 2

    assert list(follow(path, ended)) == [b"one", b"two"]


def test_an_order_to_stop_is_one_of_two(tmp_path: Path) -> None:
    assert run_directory.ordered_to_stop(tmp_path) is None
    run_directory.order_stop(tmp_path, now=False)
    assert run_directory.ordered_to_stop(tmp_path) == "in order"
    run_directory.order_stop(tmp_path, now=True)
    assert run_directory.ordered_to_stop(tmp_path) == "now"
    assert [path.name for path in tmp_path.iterdir()] == [run_directory.STOP]
