"""A check that hangs, eats memory or crashes ends with its process; what follows is checked by the next."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from millrace.core.errors import RewardError
from millrace.rewards import processes
from millrace.rewards.processes import Answer, Pool

CHECKS = """
import os, signal, subprocess, sys, threading, time

def make(offset=0):
    marked = []
    def check(request):
        what, value = request
        if what == "add":
            return value + offset
        if what == "power":           # one long integer operation: it holds the interpreter's lock
            return 9 ** 9 ** 9 ** value
        if what == "sleep":
            time.sleep(value)
        if what == "memory":
            return len(bytearray(value))
        if what == "die":
            os.kill(os.getpid(), signal.SIGSEGV)
        if what == "die once" and not os.path.exists(value):
            open(value, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "raise":
            raise KeyError(value)
        if what == "exit":
            sys.exit(value)
        if what == "print":
            print("to stdout", flush=True)
            return sys.stdin.read()
        if what == "child":
            started = subprocess.Popen(["sleep", "600"])
            open(value, "w").write(str(started.pid))
            return 9 ** 9 ** 9 ** 9
        if what == "leave one behind":
            return subprocess.Popen(["sleep", "600"]).pid
        if what == "modules":
            return [name for name in ("torch", "ray", "vllm", "transformers") if name in sys.modules]
        if what == "environment":
            return [os.getpid(), os.getppid()]
        if what == "number":
            import numpy
            return {"float": numpy.float32(0.5), "array": numpy.ones(2)}
        return "done"
    return check

def broken():
    import no_such_module

def never_ready(mark):
    open(mark, "w").write(str(os.getpid()))
    return 9 ** 9 ** 9 ** 9
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "checks_of_test_processes.py").write_text(CHECKS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "checks_of_test_processes"


@pytest.fixture
def pool(module: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    pools = []
    monkeypatch.setattr(processes, "STARVED", 0.0)  # a busy machine must not decide what a test sees

    def make(target: str = "make", **settings: Any) -> Pool:
        given = {"setup": {}, "deadline_s": 20.0, "memory_bytes": 1 << 28, "processes": 1} | settings
        pools.append(Pool(f"{module}:{target}", **given))
        return pools[-1]

    yield make
    for one in pools:
        one.close()


def gone(pid: int, within_s: float = 10.0) -> bool:
    """Whether a process ends; a zombie that nobody collects has ended."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.01)
    return False


def test_requests_are_answered_by_one_process_that_stays(pool: Any) -> None:
    checks = pool(setup={"offset": 10})
    assert checks.pids == ()  # nothing is started before it is needed
    assert [checks.run(("add", i)) for i in range(3)] == [Answer(10), Answer(11), Answer(12)]
    (pid,) = checks.pids
    assert checks.run(("environment", None)).value == [pid, os.getpid()]


def test_a_check_that_overruns_is_dead_at_its_deadline_and_the_next_is_answered(pool: Any) -> None:
    checks = pool(deadline_s=1.0)
    checks.run(("add", 1))
    (pid,) = checks.pids
    assert checks.run(("power", 9)) == Answer(fault="took longer than deadline_s = 1")
    assert not psutil.pid_exists(pid)  # killed and collected before run returned
    assert checks.run(("add", 1)) == Answer(1)
    assert checks.pids != (pid,)


def test_what_a_check_started_dies_with_it(pool: Any, tmp_path: Path) -> None:
    checks = pool(deadline_s=1.0)
    checks.run(("child", str(tmp_path / "pid")))
    assert gone(int((tmp_path / "pid").read_text()))


def test_a_check_that_only_waits_is_our_failure_and_is_killed_all_the_same(
    pool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "STARVED", 0.1)
    checks = pool(deadline_s=0.5)
    checks.run(("add", 1))
    (pid,) = checks.pids
    with pytest.raises(RewardError, match=r"processor time within deadline_s = 0.5"):
        checks.run(("sleep", 60))
    assert not psutil.pid_exists(pid)
    assert checks.run(("add", 2)).value == 2


def test_memory_is_limited(pool: Any) -> None:
    checks = pool(memory_bytes=1 << 27)
    assert checks.run(("memory", 1 << 20)).value == 1 << 20
    assert checks.run(("memory", 1 << 28)) == Answer(fault="ran out of memory")
    assert checks.run(("add", 2)).value == 2


def test_a_crash_is_the_request_s_fault_only_when_it_happens_again(pool: Any, tmp_path: Path) -> None:
    checks = pool()
    assert checks.run(("die", None)) == Answer(fault="killed by SIGSEGV")
    assert checks.run(("die once", str(tmp_path / "mark"))) == Answer("done")
    assert (tmp_path / "mark").exists()


def test_a_process_that_another_kills_in_the_middle_is_replaced_and_its_check_repeated(pool: Any) -> None:
    checks = pool()
    checks.run(("add", 1))
    (pid,) = checks.pids
    threading.Timer(0.2, lambda: os.kill(pid, signal.SIGKILL)).start()
    assert checks.run(("sleep", 0.5)) == Answer("done")
    assert not psutil.pid_exists(pid)


@pytest.mark.parametrize(
    ("request_", "message"),
    [(("raise", "x"), "raised KeyError: 'x'"), (("exit", 3), r"called exit\(3\)")],
)
def test_what_the_function_raises_is_ours_and_the_process_goes_on(pool: Any, request_: Any, message: str) -> None:
    checks = pool()
    checks.run(("add", 1))
    before = checks.pids
    with pytest.raises(RewardError, match=message):
        checks.run(request_)
    assert checks.run(("add", 1)).value == 1
    assert checks.pids == before


def test_a_process_that_cannot_start_says_why(pool: Any) -> None:
    with pytest.raises(RewardError, match="did not start.*No module named 'no_such_module'"):
        pool("broken").run(("add", 1))
    with pytest.raises(RewardError, match="did not start.*has no attribute 'nothing'"):
        pool("nothing").run(("add", 1))


def test_an_interpreter_that_is_not_there_is_named(pool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(RewardError, match="cannot start: .*no/such/python"):
        pool().run(("add", 1))


def test_what_the_function_prints_and_reads_is_not_the_protocol_s(pool: Any) -> None:
    assert pool().run(("print", None)) == Answer("")


def test_large_requests_travel(pool: Any) -> None:
    large = "x" * 5_000_000  # more than pipes hold
    assert pool(setup={"offset": "y"}).run(("add", large)).value == large + "y"


def test_numbers_of_other_libraries_arrive_as_plain_ones(pool: Any) -> None:
    assert pool().run(("number", None)).value == {"float": 0.5, "array": "array([1., 1.])"}


def test_the_child_imports_none_of_the_heavy_packages(pool: Any) -> None:
    assert pool().run(("modules", None)).value == []


def test_checks_run_side_by_side_and_one_that_hangs_holds_no_other(pool: Any) -> None:
    checks = pool(processes=2, deadline_s=600.0)

    def hang() -> None:
        with suppress(RewardError):
            checks.run(("power", 9))

    hangs = threading.Thread(target=hang)
    hangs.start()
    while not checks.pids:
        time.sleep(0.001)
    assert [checks.run(("add", i)).value for i in range(20)] == list(range(20))
    assert hangs.is_alive() and len(checks.pids) == 2
    checks.close()
    hangs.join(10)
    assert not hangs.is_alive()


def test_no_more_processes_than_asked_for(pool: Any) -> None:
    checks = pool(processes=2)
    threads = [threading.Thread(target=checks.run, args=(("sleep", 0.1),)) for _ in range(6)]
    for thread in threads:
        thread.start()
    most = 0
    while any(thread.is_alive() for thread in threads):
        most = max(most, len(checks.pids))
        time.sleep(0.005)
    assert most == 2


def test_close_leaves_no_process_and_ends_what_runs(pool: Any) -> None:
    checks = pool(processes=2)
    checks.run(("add", 1))
    caught: list[str] = []

    def run() -> None:
        try:
            checks.run(("sleep", 60))
        except RewardError as error:
            caught.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    pids = checks.pids
    time.sleep(0.1)
    checks.close()
    thread.join(10)
    assert caught and "closed" in caught[0]
    assert all(gone(pid) for pid in pids) and checks.pids == ()


def test_a_pool_that_is_forgotten_leaves_no_process(pool: Any, module: str) -> None:
    forgotten = Pool(f"{module}:make", setup={}, deadline_s=5.0, memory_bytes=1 << 28, processes=1)
    forgotten.run(("add", 1))
    (pid,) = forgotten.pids
    del forgotten
    assert gone(pid)


@pytest.mark.parametrize("busy", [True, False], ids=["in the middle of a check", "idle"])
def test_a_child_does_not_survive_its_parent(module: str, tmp_path: Path, busy: bool) -> None:
    """The parent is killed without a chance to clean up, while the child holds its interpreter's lock."""
    script = textwrap.dedent(
        f"""
        import sys, threading, time
        sys.path.insert(0, {str(tmp_path)!r})
        from millrace.rewards.processes import Pool
        pool = Pool("{module}:make", setup={{}}, deadline_s=600.0, memory_bytes=1 << 28, processes=1)
        pool.run(("add", 1))
        print(*pool.pids, flush=True)
        pool.run(("power", 9)) if {busy} else time.sleep(600)
        """
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        while busy and psutil.Process(pid).cpu_times().user < 0.3:
            time.sleep(0.01)
        assert psutil.pid_exists(pid)
    finally:
        parent.kill()
        parent.wait()
        ended = gone(pid)
        if not ended:
            os.kill(pid, signal.SIGKILL)
    assert ended


@pytest.mark.parametrize("during", ["its start", "idle, with a process left behind by an earlier check"])
def test_nothing_of_a_child_survives_its_parent(module: str, tmp_path: Path, during: str) -> None:
    """The parent is killed while the child imports, or holds nothing but what a check started and did not end."""
    mark = tmp_path / "pid"
    starts = during == "its start"
    script = textwrap.dedent(
        f"""
        import sys, time
        sys.path.insert(0, {str(tmp_path)!r})
        from millrace.rewards.processes import Pool
        target, setup = ("never_ready", {{"mark": {str(mark)!r}}}) if {starts} else ("make", {{}})
        pool = Pool("{module}:" + target, setup=setup, deadline_s=600.0, memory_bytes=1 << 28, processes=1)
        left = pool.run(("leave one behind", None)).value
        open({str(mark)!r}, "w").write(str(left))
        time.sleep(600)
        """
    )
    parent = subprocess.Popen([sys.executable, "-c", script])
    try:
        while not (mark.exists() and mark.read_text()):
            time.sleep(0.01)
        pid = int(mark.read_text())
        assert psutil.pid_exists(pid)
    finally:
        parent.kill()
        parent.wait()
    ended = gone(pid)
    if not ended:
        os.kill(pid, signal.SIGKILL)
    assert ended
