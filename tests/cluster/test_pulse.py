"""How Ray's processes are seen to end."""

import signal
import subprocess
import sys

import psutil
import pytest

from millrace.cluster import pulse


def started(code: str) -> tuple[subprocess.Popen[str], psutil.Process]:
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, text=True)
    return child, psutil.Process(child.pid)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os; os.kill(os.getpid(), 9)", "was ended by SIGKILL"),
        ("import sys; sys.exit(3)", "ended with status 3"),
    ],
)
def test_it_says_how_a_process_ended(code: str, said: str) -> None:
    child, process = started(f"input(); {code}")
    assert pulse._end(process) is None, "it waits for its input, and is said to have ended"
    child.communicate("\n")  # and with it Python asks for its status, as Ray may do before us
    assert pulse._end(process) == "has ended"
    child, process = started(code)
    while process.status() != psutil.STATUS_ZOMBIE:
        pass
    assert pulse._end(process) == said
    child.wait()


def test_one_whose_threads_are_still_ending_is_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel calls it a zombie, and gives its status when the last thread has ended."""
    child, process = started("input()")
    child.send_signal(signal.SIGKILL)
    while process.status() != psutil.STATUS_ZOMBIE:
        pass
    wait = process.wait

    def not_yet(timeout: float) -> None:
        raise psutil.TimeoutExpired(timeout)

    monkeypatch.setattr(process, "wait", not_yet)
    assert pulse._end(process) is None
    monkeypatch.setattr(process, "wait", wait)
    assert pulse._end(process) == "was ended by SIGKILL"
    child.wait()
