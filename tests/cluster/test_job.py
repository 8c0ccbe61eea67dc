"""Jobs: runs in processes of their own, seen from outside."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from millrace import Job, RunConfig
from millrace.cluster import config as configs
from millrace.cluster import job as job_module
from millrace.cluster import jobs, run_directory, snapshot
from millrace.cluster.snapshot import Status
from millrace.core.errors import (
    ConfigError,
    DataError,
    DeadlineError,
    EngineError,
    MillraceError,
    RecipeError,
    RewardError,
)
from tests.faults.leaks import nothing_left

pytestmark = pytest.mark.ray

DEADLINE_S = 120.0  # of what takes a second or two on a machine with nothing else to do


def until(true: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + DEADLINE_S
    while not (found := true()):
        assert time.monotonic() < deadline, what
        time.sleep(0.02)
    return found


def running(job: Job, step: int = 3) -> Status:
    """Its status once it has made some steps, and committed one."""
    found: Status = until(lambda: (s := job.status()).step >= step and s.committed_step and s, "steps")
    assert found.state == "running"
    return found


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.fixture
def endless(make_run: Any) -> RunConfig:
    """A run that does not end before it is told to."""
    config: RunConfig = make_run(loop={"steps": 10**6}, learner={"checkpoint_every": 1}, evaluation={"every": 10**6})
    return config


@pytest.fixture
def started(endless: RunConfig) -> Iterator[Job]:
    job = Job.submit(endless, local=True)
    yield job
    job.stop(now=True)
    until(lambda: job.ended, "the end")


def test_the_two_names_need_neither_torch_nor_ray() -> None:
    code = (
        "import sys; import millrace; before = set(sys.modules); from millrace import Job, RunConfig\n"
        "print(sorted({'torch', 'ray', 'transformers', 'vllm', 'tensorboard', 'rich'} & sys.modules.keys()))\n"
        "print('millrace.cluster.config' in before, Job.__name__, RunConfig.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "False Job RunConfig"]


@pytest.fixture(scope="module")
def followed(make_run_in: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Status, list[Any]]:
    """A job that was followed to its end: itself, its status as it began, and the rows that came."""
    config = make_run_in(tmp_path_factory.mktemp("job"), "followed", loop={"steps": 12})
    job = Job.submit(config, local=True)
    return job, job.status(), list(job.metrics(follow=True))


def test_a_job_is_its_directory_and_ends_with_a_result(followed: Any) -> None:
    job, first, _ = followed
    assert first.state in ("starting", "running")
    assert (first.id, first.name, first.steps) == (job.id, "followed", 12)
    assert first.pid != os.getpid()
    last = job.wait()
    assert (last.state, last.step, last.committed_step, last.error, last.eta_s) == ("finished", 12, 12, None, None)
    assert last.held_out == {"step": 12, "mean": pytest.approx(1, abs=0.1)}
    assert last.tokens["generated"] == last.tokens["trained"] == job.result()["tokens"]["generated"]
    assert last.draws["committed"] == 12 * 16
    assert last.rates["trained_tokens_per_s"] > 0
    assert (job.result()["ended"], job.result()["steps"]) == ("finished", 12)
    until(lambda: not alive(last.pid), "the end of its process")


def test_rows_come_in_order_while_it_runs_and_again_afterwards(followed: Any) -> None:
    job, _, rows = followed
    assert [row["step"] for row in rows if "held_out" not in row] == list(range(1, 13))
    assert [row["step"] for row in rows if "held_out" in row] == [0, 4, 8, 12]
    assert list(job.metrics()) == rows
    assert [event["kind"] for event in job.events()][::5] == ["started", "finished"]


def test_another_process_attaches_by_path_or_name(followed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    job, _, rows = followed
    assert Job.attach(job.id).result() == job.result()
    monkeypatch.chdir(job.directory.parents[1])
    assert Job.attach("followed").id == Job.attach(Path("runs") / "followed").id == job.id
    code = "from millrace import Job; job = Job.attach('followed'); print(job.wait().state, len(list(job.metrics())))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["finished", str(len(rows))]
    with pytest.raises(ConfigError, match=r"followd: there is no such run, .* below runs/; did you mean 'followed'\?"):
        Job.attach("followd")


def test_a_run_is_not_written_over_and_a_finished_one_is_not_resumed(followed: Any) -> None:
    job, _, _ = followed
    files = [path for path in job.directory.rglob("*") if path.name != run_directory.LOCK]
    before = {path: path.stat().st_mtime_ns for path in files}
    with pytest.raises(ConfigError, match="holds a run already: continue it with --resume"):
        Job.submit(configs.of_directory(job.directory), local=True)
    assert Job.resume(job.id, local=True).status().state == "finished"
    assert {path: path.stat().st_mtime_ns for path in files} == before


def test_what_is_wrong_is_raised_where_it_was_submitted(make_run: Any, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="asks for reference_logprob_N: give the run a reference model"):
        Job.submit(make_run(recipe="grpo_kl"), local=True)
    with pytest.raises(ConfigError, match=r"joining the Ray cluster at 127\.0\.0\.1:1 .*Connection refused"):
        Job.submit(make_run(), address="127.0.0.1:1")
    assert not list(tmp_path.iterdir())


def test_a_refusal_leaves_nothing_of_what_was_begun_beside_the_check(make_run: Any, tmp_path: Path) -> None:
    with nothing_left(), pytest.raises(RecipeError, match="asks for reference_logprob_N"):
        Job.submit(make_run(recipe="grpo_kl"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [DataError, ConfigError, EngineError, KeyError])
def test_an_error_keeps_its_class_if_it_is_one_of_ours(kind: type[Exception]) -> None:
    error = job_module.raised({"kind": kind.__name__, "message": "such and such"})
    assert type(error) is (kind if issubclass(kind, MillraceError) else MillraceError)
    assert str(error) == "such and such"


def test_a_driver_that_dies_before_it_answers_is_quoted(endless: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_module.sys, "executable", "/bin/false")
    with pytest.raises(MillraceError, match="the driver ended with status 1 before it had checked the run"):
        Job.submit(endless, local=True)


def test_a_config_of_keywords_starts_at_the_working_directory(
    digit_model: Path, copy_task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(copy_task["train"].read_text())
    config = RunConfig(
        model=str(digit_model), data={"train": "rows.jsonl"}, loop={"steps": 2, "groups_per_step": 4, "group_size": 4}
    )
    made = configs.anchored(config, tmp_path)
    assert (made.name, made.directory, made.recipe.origin) == ("run", tmp_path / "runs" / "run", "grpo")
    assert made.data.train == str(tmp_path / "rows.jsonl")
    with pytest.raises(ConfigError, match=r"^RunConfig: loop: unknown key 'stepz'; did you mean 'steps'\?"):
        RunConfig(model="m", data={"train": "x"}, loop={"stepz": 2})
    with pytest.raises(RecipeError, match="unknown recipe 'grpoo'"):
        RunConfig(model="m", recipe="grpoo", data={"train": "x"}, loop={"steps": 2})


def test_a_killed_driver_has_failed_and_its_run_goes_on(started: Job, endless: RunConfig) -> None:
    status = running(started)
    with pytest.raises(ConfigError, match=rf"is being run by process {status.pid} on {status.host}: .*millrace stop"):
        Job.resume(started.id, local=True)
    with pytest.raises(ConfigError, match="is being run by process"):
        jobs.train(endless, local=True, resume=True, say=lambda line: None)  # which looks for itself
    with pytest.raises(ConfigError, match=r"has no result \(state running, step \d+ of 1000000\); \.wait\(\) for it"):
        started.result()
    with pytest.raises(DeadlineError, match="has not ended within 0 s"):
        started.wait(timeout_s=0)
    os.kill(status.pid, signal.SIGKILL)
    with pytest.raises(MillraceError, match="has ended without a word, at step .*--resume"):
        started.wait(DEADLINE_S)
    lost = started.status()
    assert (lost.state, lost.error and lost.error["kind"]) == ("failed", snapshot.LOST)
    again = Job.resume(started.id, local=True)
    assert running(again, step=lost.committed_step + 2).pid not in (status.pid, lost.pid)
    again.stop()
    assert again.wait(DEADLINE_S).state == "stopped"
    rows = [row["step"] for row in again.metrics() if "held_out" not in row]
    assert rows == sorted(set(rows))
    assert again.result()["steps"] == rows[-1] == again.status().committed_step


def test_at_once_means_at_once(started: Job) -> None:
    pid = running(started).pid
    started.stop(now=True)
    assert started.wait(DEADLINE_S).state == "stopped"
    until(lambda: not alive(pid), "the end of its process")
    assert not (started.directory / run_directory.STOP).exists()
    with pytest.raises(ConfigError, match="has no result"):
        started.result()
    assert [event["kind"] for event in started.events()][-1] == "interrupted"


def test_an_attached_run_ends_in_order_with_whoever_started_it(endless: RunConfig, tmp_path: Path) -> None:
    configs.save(endless, tmp_path / "run.toml")
    code = (
        "import time; from millrace import Job, RunConfig\n"
        "print(Job.submit(RunConfig.load('run.toml'), local=True, attached=True).id, flush=True); time.sleep(1000)"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True) as submitter:
        assert submitter.stdout is not None
        job = Job.attach(submitter.stdout.readline().strip())
        pid = running(job).pid
        submitter.kill()
    try:
        assert job.wait(DEADLINE_S).state == "stopped"
    finally:
        job.stop(now=True)
    assert job.result()["steps"] == job.status().committed_step > 0
    until(lambda: not alive(pid), "the end of its process")


def test_what_fails_later_is_raised_by_wait(make_run: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def score(text):\n    raise KeyError('answers')\n")
    job = Job.submit(make_run(rewards={"verifier": f"{tmp_path}/mine.py:score"}), local=True)
    with pytest.raises(RewardError, match="answers"):
        job.wait(DEADLINE_S)
    status = job.status()
    assert status.state == "failed"
    assert status.error == {"kind": "RewardError", "message": status.error and status.error["message"]}
    assert "Traceback" in (job.directory / run_directory.DRIVER_LOG).read_text()


def test_a_job_on_ray_outlives_whoever_submitted_it(make_run: Any, tmp_path: Path) -> None:
    configs.save(make_run(loop={"steps": 4}), tmp_path / "run.toml")
    code = "from millrace import Job, RunConfig; print(Job.submit(RunConfig.load('run.toml')).id)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    job = Job.attach(done.stdout.strip())
    rows = list(job.metrics(follow=True))
    assert [row["step"] for row in rows if "held_out" not in row] == [1, 2, 3, 4]
    status = job.wait(DEADLINE_S)
    assert (status.state, job.result()["waste"]["unaccounted"]) == ("finished", 0)
    until(lambda: not alive(status.pid), "the end of its process")
    assert json.loads((job.directory / "status.json").read_text())["schema"] == snapshot.SCHEMA_VERSION


def test_what_cannot_be_submitted_is_said_before_a_driver_starts(make_run: Any) -> None:
    with pytest.raises(ConfigError, match=r"takes a RunConfig, not 'run\.toml': RunConfig\.load\(path\)"):
        Job.submit("run.toml")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="a local run needs no Ray, and joins no cluster at auto: leave out one"):
        Job.submit(make_run(), address="auto", local=True)
