"""Failpoints: silent unless armed, and one failure for all processes that inherit the variable."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from millrace.core import failpoint
from millrace.core.errors import ConfigError

PROGRAM = """
from millrace.core.failpoint import reach
for number in range(4):
    reach("a")
    reach("b")
    print(number, flush=True)
"""


def run(text: str | None) -> tuple[int, str]:
    own = {name: value for name, value in os.environ.items() if name != failpoint.VARIABLE}
    env = own if text is None else {**own, failpoint.VARIABLE: text}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout


def test_it_kills_at_the_nth_time_and_only_once_over_all_processes(tmp_path: Path) -> None:
    text = f"b@3=kill:{tmp_path / 'marker'}"
    assert run(text) == (-signal.SIGKILL, "0\n1\n")
    assert (tmp_path / "marker").exists()
    assert run(text) == (0, "0\n1\n2\n3\n")
    assert run(None) == (0, "0\n1\n2\n3\n")


def test_it_stops_a_process_which_then_goes_on(tmp_path: Path) -> None:
    env = {**os.environ, failpoint.VARIABLE: f"a@2=stop:{tmp_path / 'marker'}"}
    child = subprocess.Popen([sys.executable, "-c", PROGRAM], env=env, stdout=subprocess.PIPE, text=True)
    try:
        _, status = os.waitpid(child.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        child.send_signal(signal.SIGCONT)
        assert child.communicate(timeout=60)[0] == "0\n1\n2\n3\n"
    finally:
        child.kill()
        child.wait()


@pytest.mark.parametrize("text", ["", "a", "a@1", "a@x=kill:/m", "a@1=end:/m", "a@1=kill:", "@1=kill:/m"])
def test_another_form_is_refused_with_the_right_one(text: str) -> None:
    with pytest.raises(ConfigError, match="NAME@N=kill:MARKER"):
        failpoint.parsed(text)
