"""Every way that a run can end, at every phase: quickly, with word of what it left undone, and nothing left behind."""

import fcntl
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.cluster_utils import Cluster

from millrace import Job, RunConfig
from millrace.cluster import config as configs
from millrace.cluster import run_directory, snapshot
from millrace.core.errors import ComponentLost
from tests.faults.leaks import Census, nothing_left

START_S = 120.0  # of what takes seconds on a machine with nothing else to do
END_S = 10.0
AT_ONCE_S = 2.0
WITHOUT_RAY_S = 30.0

CLI = "import sys; from millrace.cluster.cli import main; main(sys.argv[1:])"

ONCE = pytest.param("once", marks=pytest.mark.faults)
TWICE = pytest.param("twice", marks=pytest.mark.faults)
NOW = pytest.param("now", marks=pytest.mark.faults)
KILLED = pytest.param("killed", marks=pytest.mark.faults)


def until(true: Callable[[], Any], what: str, within_s: float = START_S) -> Any:
    deadline = time.monotonic() + within_s
    while not (found := true()):
        assert time.monotonic() < deadline, what
        time.sleep(0.05)
    return found


def said(directory: Path) -> str:
    with suppress(FileNotFoundError):
        return (directory / run_directory.PROGRESS_LOG).read_text()
    return ""


def driver(directory: Path) -> int:
    """The process that holds the run directory."""
    pid: int = json.loads((directory / run_directory.LOCK).read_text())["pid"]
    return pid


def titles(census: Census) -> dict[str, int]:
    """Programs of ours that run."""
    found = {}
    for each in census.processes():
        with suppress(OSError):
            found[Path(f"/proc/{each.pid}/comm").read_text().strip()] = each.pid
    return found


def actors() -> list[str]:
    """Titles of actors on clusters that this process started."""
    titles = []
    for each in psutil.Process().children(recursive=True):
        with suppress(psutil.Error, IndexError):
            titles.append(each.cmdline()[0])
    return [title for title in titles if title.startswith("ray::") and "IDLE" not in title and "Agent" not in title]


def step(directory: Path) -> int:
    status = snapshot.read(directory)
    return status.step if status is not None else 0


# When each phase has begun.
PHASES: dict[str, Callable[[Path, Census], Any]] = {
    "checking": lambda directory, census: any("millrace.cluster.driver" in str(each) for each in census.processes()),
    "starting Ray": lambda directory, census: "gcs_server" in titles(census),
    "loading": lambda directory, census: "starting the learner, the engines" in said(directory),
    "first batch": lambda directory, census: "learner is ready" in said(directory),
    "training": lambda directory, census: step(directory) >= 3,
    "concluding": lambda directory, census: (directory / run_directory.RESULT).exists(),
}


@pytest.fixture
def made(make_run: Any, tmp_path: Path) -> Callable[[str], RunConfig]:
    """A run to be ended in a phase: it does not end before that."""

    def of(phase: str) -> RunConfig:
        steps = 4 if phase == "concluding" else 10**6
        sections = {"learner": {"checkpoint_every": 2}, "evaluation": {"every": 10**6}, "loop": {"steps": steps}}
        config: RunConfig = make_run(**sections)
        configs.save(config, tmp_path / "run.toml")
        return config

    return of


@contextmanager
def begun(config: RunConfig, phase: str, **where: Any) -> Iterator[tuple[Job, Census]]:
    """A job that is in a phase; when the block is left, nothing of it is."""
    with nothing_left(END_S) as census:
        job = Job.submit(config, **where)
        until(lambda: PHASES[phase](job.directory, census), phase)
        try:
            yield job, census
        finally:
            with suppress(FileNotFoundError, ProcessLookupError):
                if not job.ended:
                    os.kill(driver(job.directory), signal.SIGKILL)


@pytest.mark.parametrize("way", [ONCE, TWICE, NOW, KILLED])
@pytest.mark.parametrize("phase", [phase for phase in PHASES if phase != "checking"])
def test_a_job_ends_in_time_with_word_of_it(made: Any, phase: str, way: str) -> None:
    with begun(made(phase), phase) as (job, _):
        ended(job, way)
    word_of(job, phase, way)


@pytest.mark.ray
@pytest.mark.parametrize("way", ["once", "killed"])
def test_a_job_that_trains_ends_in_time_with_word_of_it(made: Any, way: str) -> None:
    with begun(made("training"), "training") as (job, _):
        ended(job, way)
    word_of(job, "training", way)


def ended(job: Job, way: str) -> None:
    """End it one way, and see it end in time."""
    pid = driver(job.directory)
    if way == "now":
        job.stop(now=True)
    else:
        os.kill(pid, signal.SIGKILL if way == "killed" else signal.SIGTERM)
    if way == "twice":
        time.sleep(0.3)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGINT)
    began = time.monotonic()
    until(lambda: job.ended, f"the end, {way}", within_s=END_S if way == "once" else AT_ONCE_S)
    print(f"{way}: {time.monotonic() - began:.2f} s")


def word_of(job: Job, phase: str, way: str) -> None:
    """What its files say of the end."""
    status = job.status()
    if phase == "concluding":
        assert status.state == "finished"
    elif way == "killed":
        assert (status.state, status.error and status.error["kind"]) == ("failed", snapshot.LOST)
        assert f"--resume {job.id}" in (status.error or {}).get("message", "")
    elif (job.directory / run_directory.RESULT).exists():
        assert (status.state, status.note) == ("stopped", "")
        assert job.result()["steps"] == status.step == status.committed_step
    else:
        last = said(job.directory).splitlines()[-1]  # a driver that was killed may not have said anything yet
        assert status.state == "stopped"
        assert status.note == last == snapshot.cut_short(status)
        assert f"continue with `millrace train --resume {job.id}`" in last


@pytest.mark.ray
def test_a_run_whose_driver_was_killed_goes_on_at_once(made: Any) -> None:
    with begun(made("training"), "training") as (job, _):
        committed = until(lambda: job.status().committed_step, "a commit")
        os.kill(driver(job.directory), signal.SIGKILL)
        again = Job.resume(job.id)
        assert again.status().committed_step >= committed
        until(lambda: again.status().state == "running", "the second incarnation")
        again.stop()
        assert again.wait(START_S).state == "stopped"


@pytest.mark.faults
@pytest.mark.parametrize("name", ["gcs_server", "raylet"])
@pytest.mark.parametrize("phase", ["loading", "training"])
def test_a_run_without_ray_ends_and_says_what_died(made: Any, phase: str, name: str) -> None:
    with begun(made(phase), phase) as (job, census):
        pid = titles(census)[name]
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(ComponentLost, match=rf"^Ray's {name}, process {pid}, was ended by SIGKILL, at step") as why:
            job.wait(WITHOUT_RAY_S)
    assert f"continue with `millrace train --resume {job.id}`" in str(why.value)
    assert job.status().state == "failed"


@pytest.mark.faults
@pytest.mark.parametrize("way", ["once", "killed"])
def test_a_job_on_a_cluster_that_runs_leaves_only_the_cluster(
    made: Any, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # the cluster of the tests asks for no token
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 100 * 2**20})
    try:
        census = Census()
        os.environ["MILLRACE_CENSUS"] = census.mark
        job = Job.submit(made("training"), address=cluster.address)
        until(lambda: step(job.directory) >= 3, "steps")
        assert any("Learner" in title for title in actors())
        ended(job, way)
        until(lambda: not census.left() and not actors(), "the end of its processes", within_s=END_S)
    finally:
        os.environ.pop("MILLRACE_CENSUS", None)
        cluster.shutdown()
    word_of(job, "training", way)


@contextmanager
def in_a_terminal(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], int, Path]]:
    """`millrace train run.toml` in a terminal of its own: the process, the terminal, the run's directory."""
    terminal, inner = pty.openpty()

    def controlled() -> None:
        os.setsid()
        for number in (signal.SIGHUP, signal.SIGINT):  # the tests themselves may run under nohup, or in the background
            signal.signal(number, signal.SIG_DFL)
        fcntl.ioctl(inner, termios.TIOCSCTTY, 0)

    with (tmp_path / "screen").open("wb") as screen:
        process = subprocess.Popen(
            [sys.executable, "-c", CLI, "train", "run.toml", "--plain"],
            cwd=tmp_path,
            stdin=inner,
            stdout=screen,
            stderr=screen,
            preexec_fn=controlled,
        )
    os.close(inner)
    try:
        yield process, terminal, tmp_path / "runs" / "run"
    finally:
        with suppress(OSError):
            os.close(terminal)
        process.kill()
        process.wait()


WAYS = {
    "Ctrl-C": (END_S, 1),
    "Ctrl-C twice": (AT_ONCE_S + 1, 2),  # the command line looks for keys and files a few times a second
    "SIGTERM": (END_S, 1),
    "kill -9": (END_S, 0),
    "the terminal closes": (END_S, 0),
}


@pytest.mark.parametrize("phase", ["checking", "starting Ray", "loading", "training"])
@pytest.mark.parametrize("way", [pytest.param(way, marks=pytest.mark.faults) for way in WAYS])
def test_the_command_line_ends_with_its_run(made: Any, tmp_path: Path, phase: str, way: str) -> None:
    config = made(phase)
    with nothing_left(END_S) as census, in_a_terminal(tmp_path) as (process, terminal, directory):
        began = ask(process, terminal, lambda: PHASES[phase](directory, census), way)
        within_s = WAYS[way][0]
        status = process.wait(timeout=within_s)
        until(lambda: not run_directory.is_held(directory), "the end of the run", within_s=within_s)
        print(f"{phase}, {way}: {time.monotonic() - began:.2f} s, status {status}")
    if WAYS[way][1]:
        result = config.directory / run_directory.RESULT
        assert status == (0 if result.exists() and way != "Ctrl-C twice" else 130)
    if phase == "training":
        moment = snapshot.read(directory)
        assert moment is not None
        assert moment.state == "stopped"
        screen = (tmp_path / "screen").read_text()
        assert moment.note in screen


def ask(process: subprocess.Popen[bytes], terminal: int, true: Callable[[], Any], way: str) -> float:
    """End the command line one way, once it is time. Returns when."""
    until(true, "the phase")
    began = time.monotonic()
    if way == "SIGTERM":
        process.terminate()
    elif way == "kill -9":
        process.kill()
    elif way == "the terminal closes":
        os.close(terminal)
    else:
        os.write(terminal, b"\x03")
        if way == "Ctrl-C twice":
            time.sleep(0.4)
            os.write(terminal, b"\x03")
    return began
