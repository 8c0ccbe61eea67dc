"""The command line: what it says, and the status it ends with."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from millrace import __version__
from millrace.cluster import config as configs
from millrace.cluster import run_directory, snapshot
from millrace.cluster.cli import main
from millrace.cluster.commands import summary
from millrace.cluster.job import Job, show_token
from millrace.cluster.snapshot import Snapshot
from millrace.core.errors import DataError

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def run_file(make_run: Any, tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    configs.save(make_run(), path)
    return path


def ended(*arguments: str | Path) -> int:
    """The status that the command ends with; the tests hear Ctrl-C as before."""
    heard = signal.getsignal(signal.SIGINT)
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as caught:
        return int(caught.code or 0)
    finally:
        signal.signal(signal.SIGINT, heard)
    return 0


def test_help_needs_neither_torch_nor_ray() -> None:
    code = (
        "import sys; from millrace.cluster.cli import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit as ended: assert not ended.code\n"
        "print(sorted({'torch', 'ray', 'transformers', 'vllm'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    for word in ("RUN.toml", "key=value", "--resume", "--dry-run", "--address", "--local", "--detach", "--plain"):
        assert word in done.stdout


def test_the_module_is_the_same_command() -> None:
    done = subprocess.run([sys.executable, "-m", "millrace", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"millrace {__version__}\n"


def test_the_version_is_said(capsys: Capture) -> None:
    assert ended("--version") == 0
    assert capsys.readouterr().out == f"millrace {__version__}\n"


def test_a_dry_run_says_what_would_run_and_makes_nothing(run_file: Path, capsys: Capture) -> None:
    before = sorted(run_file.parent.rglob("*"))
    assert ended("train", run_file, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "12 steps of 16 groups x 8 rollouts, at most 1 versions old" in said
    assert f"-> {run_file.parent / 'runs' / 'run'}" in said
    assert sorted(run_file.parent.rglob("*")) == before


@pytest.mark.parametrize(
    "order",
    [
        ("train", "RUN", "loop.steps=7", "name=other", "--dry-run"),
        ("train", "RUN", "--dry-run", "loop.steps=7", "name=other"),
        ("train", "--dry-run", "RUN", "loop.steps=7", "name=other"),
        ("train", "RUN", "loop.steps=7", "--local", "--dry-run", "name=other"),
    ],
)
def test_settings_stand_anywhere_behind_the_file(order: tuple[str, ...], run_file: Path, capsys: Capture) -> None:
    assert ended(*(run_file if word == "RUN" else word for word in order)) == 0
    said = capsys.readouterr().out
    assert "7 steps of 16 groups" in said
    assert str(Path("runs") / "other") in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "RUN", "loop.stepz=7"), "loop: unknown key 'stepz'; did you mean 'steps'?"),
        (("train", "RUN", "steps"), "'steps' is no setting: write key=value, as loop.steps=20"),
        (("train", "RUN", "=3"), "'=3' is no setting"),
        (("train", "RUN", "loop.steps=many"), "loop.steps: Input should be a valid integer"),
        (("train", "RUN", "recipe=grpoo"), "unknown recipe 'grpoo'; did you mean 'grpo'"),
        (("train", "RAN"), "there is no such file; did you mean 'run.toml'?"),
        (("train",), "give either RUN.toml, or --resume DIRECTORY"),
        (
            ("train", "--resume", "HERE", "loop.steps=3"),
            "a resumed run keeps its configuration: leave out loop.steps=3",
        ),
        (("train", "--resume", "HERE"), "is no run directory, it has no config.toml"),
        (("train", "--resume", "HERE", "--dry-run"), "is no run directory, it has no config.toml"),
        (("attach", "nowhere"), "nowhere: there is no such run, neither as a path nor below runs/"),
        (("stop", "nowhere"), "nowhere: there is no such run"),
        (("status", "nowhere"), "nowhere: there is no such run"),
        (("jobs", "nowhere"), "nowhere: there are no runs below it"),
        (("list", "surogates"), "there is no catalogue 'surogates'; did you mean 'surrogates'?"),
        (("show", "grpoo"), "no recipe and no method 'grpoo'; did you mean 'grpo'?"),
        (("train", "RUN", "--resume", "HERE"), "a resumed run keeps its configuration: leave out"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_with_status_2(
    arguments: tuple[str, ...], message: str, run_file: Path, capsys: Capture
) -> None:
    places = {"RUN": run_file, "RAN": run_file.with_name("ran.toml"), "HERE": run_file.parent}
    before = sorted(run_file.parent.rglob("*"))
    assert ended(*(places.get(word, word) for word in arguments)) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.startswith("millrace: ")
    assert len(said.err.splitlines()) == 1
    assert said.out == ""
    assert sorted(run_file.parent.rglob("*")) == before


@pytest.mark.parametrize("arguments", [("trian",), ("train", "run.toml", "--lokal"), ()])
def test_an_unknown_command_or_option_ends_with_status_2(arguments: tuple[str, ...], capsys: Capture) -> None:
    assert ended(*arguments) == 2
    assert "usage: millrace" in capsys.readouterr().err


class Played:
    """A job as a test plays it: what a watcher sees is given, what it orders is noted."""

    def __init__(self, directory: Path, *scenes: list[str] | BaseException) -> None:
        self.directory, self.id = directory, str(directory)
        self.ended = False
        self.orders: list[str] = []
        self._scenes = list(scenes)

    def lines(self) -> Any:
        scene = self._scenes.pop(0)
        if isinstance(scene, BaseException):
            raise scene
        yield from scene

    def stop(self, *, now: bool = False) -> None:
        self.orders.append("now" if now else "in order")

    def wait(self, timeout_s: float | None = None) -> Any:
        if self._scenes and isinstance(self._scenes[0], BaseException):
            raise self._scenes[0]
        return Snapshot(self.directory).update(state="stopped", step=2)

    def result(self) -> Any:
        return {"ended": "stopped", "steps": 2, "seconds": 1.0, "directory": self.id}


def played(monkeypatch: pytest.MonkeyPatch, directory: Path, *scenes: list[str] | BaseException) -> Played:
    job = Played(directory, *scenes)
    monkeypatch.setattr(Job, "submit", lambda config, **where: job)
    return job


def test_what_fails_ends_with_status_1(
    run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    played(monkeypatch, tmp_path, ["begun"], DataError("rows.jsonl: line 3 is torn"))
    assert ended("train", run_file) == 1
    said = capsys.readouterr()
    assert (said.out, said.err) == ("begun\n", "millrace: rows.jsonl: line 3 is torn\n")


def test_the_first_interrupt_stops_in_order_and_goes_on_watching(
    run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    job = played(monkeypatch, tmp_path, KeyboardInterrupt(), ["stopping"])
    (tmp_path / run_directory.RESULT).write_text("{}")
    assert ended("train", run_file) == 0
    assert job.orders == ["in order"]
    assert capsys.readouterr().out.splitlines()[:2] == ["stopping", "stopped after 2 steps in 1 s"]


def test_the_second_interrupt_stops_at_once_with_status_130(
    run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    job = played(monkeypatch, tmp_path, KeyboardInterrupt(), KeyboardInterrupt())
    assert ended("train", run_file) == 130
    assert job.orders == ["in order", "now"]
    said = capsys.readouterr().out
    assert f"ending {tmp_path} at once\nstopped during step 3 without a checkpoint; nothing was committed yet" in said


def test_a_run_that_another_stops_at_once_ends_with_status_130(
    run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    played(monkeypatch, tmp_path, [])
    assert ended("train", run_file) == 130
    said = capsys.readouterr().out
    assert f"nothing was committed yet; continue with `millrace train --resume {tmp_path}`" in said


def test_an_interrupt_leaves_a_run_alone_that_one_is_attached_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    job = Played(tmp_path, KeyboardInterrupt())
    job.status = lambda: None  # type: ignore[attr-defined]  # it has begun
    monkeypatch.setattr(Job, "attach", lambda id: job)
    assert ended("attach", tmp_path) == 0
    assert job.orders == []
    assert f"{tmp_path} goes on; millrace stop {tmp_path} ends it" in capsys.readouterr().out


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run that ended, and one whose driver is gone."""
    monkeypatch.chdir(tmp_path)
    runs = tmp_path / "runs"
    for name, facts in {"old": {"state": "finished", "reward": 0.5}, "newer": {"state": "running"}}.items():
        (runs / name).mkdir(parents=True)
        (runs / name / run_directory.CONFIG).write_text("")
        Snapshot(runs / name, name=name, steps=9).update(step=3, **facts)
        (runs / name / run_directory.PROGRESS_LOG).write_text("".join(f"line {i}\n" for i in range(50)))
    (runs / "no run").mkdir()
    return runs


def test_jobs_are_a_line_each(runs: Path, capsys: Capture) -> None:
    assert ended("jobs") == 0
    old, newer = sorted(capsys.readouterr().out.splitlines(), reverse=True)
    assert old == "old    finished  step 3/9  reward 0.500"
    assert newer.startswith("newer  failed    step 3/9  the driver, process ")


def test_a_status_is_for_people_or_for_programs(runs: Path, capsys: Capture) -> None:
    assert ended("status", "old") == 0
    said = capsys.readouterr().out
    assert "finished, process " in said
    assert "step 3/9  reward 0.500" in said
    assert ended("status", "newer", "--json") == 0
    told = snapshot.Status.from_json(capsys.readouterr().out)
    assert (told.state, told.error and told.error["kind"]) == ("failed", "DriverLost")


def test_attaching_shows_the_last_lines_and_how_it_ended(runs: Path, capsys: Capture) -> None:
    assert ended("attach", "newer") == 1
    said = capsys.readouterr()
    assert said.out.splitlines() == [f"line {i}" for i in range(30, 50)]
    assert "has ended without a word" in said.err


def test_what_does_not_run_is_not_stopped(runs: Path, capsys: Capture) -> None:
    assert ended("stop", "old") == 0
    assert capsys.readouterr().out == f"{runs / 'old'} is not running: finished\n"
    assert not (runs / "old" / run_directory.STOP).exists()
    with run_directory.held(runs / "old"):
        assert ended("stop", "old", "--now") == 0
        assert run_directory.ordered_to_stop(runs / "old") == "now"


def test_the_catalogues_are_at_hand(capsys: Capture) -> None:
    assert ended("list", "ratios") == 0
    assert "  token" in capsys.readouterr().out
    assert ended("show", "grpo") == 0
    assert "clip(low=0.2, high=0.2, dual=None)" in capsys.readouterr().out


@pytest.mark.ray
def test_a_run_ends_with_its_summary_and_status_0(run_file: Path, capsys: Capture) -> None:
    assert ended("train", run_file, "loop.steps=2", "--local") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("run        run -> ")
    assert any(line.startswith("finished after 2 steps in ") for line in said)
    assert any(line.startswith("training reward 0.") and " -> " in line for line in said)
    assert any(line.startswith("held-out reward 0.") for line in said)
    assert any(line.startswith('tokens {"generated": ') and '"unaccounted": 0}' in line for line in said)
    assert said[-1] == str(run_file.parent / "runs" / "run" / "report.html")


def test_a_dry_run_says_that_the_directory_holds_a_run(run_file: Path, capsys: Capture) -> None:
    directory = run_file.parent / "runs" / "run"
    directory.mkdir(parents=True)
    (directory / "metrics.jsonl").write_text('{"step": 1}\n')
    assert ended("train", run_file, "--dry-run") == 2
    assert f"{directory} holds a run already: continue it with --resume" in capsys.readouterr().err


def test_a_summary_without_scores_is_words() -> None:
    found = {"ended": "stopped", "steps": 0, "seconds": 0.0, "directory": "x", "reward": None}
    assert summary({**found, "held_out": {"first": {"mean": None}, "last": {"mean": 0.5}}}).splitlines() == [
        "stopped after 0 steps in 0 s",
        "held-out reward no score -> 0.500",
        "x/report.html",
    ]


def test_the_summary_of_a_run_that_was_stopped_says_how_it_goes_on() -> None:
    found = {"ended": "stopped", "steps": 3, "seconds": 0.0, "directory": "x", "checkpoint": "x/checkpoints/step_3.1"}
    assert "continue with: millrace train --resume x" in summary(found).splitlines()
    assert "continue" not in summary({**found, "ended": "finished"})


def test_a_reward_module_beside_the_user_is_found_by_a_dry_run_too(
    run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "reward_beside_the_user.py").write_text("def score(text):\n    return 1.0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    assert ended("train", run_file, "--dry-run", "rewards.verifier=reward_beside_the_user:score") == 0


@pytest.mark.parametrize(
    ("environment", "has_file", "mode"),
    [
        ({}, False, None),
        ({}, True, "token"),
        ({"RAY_AUTH_TOKEN": "x"}, False, "token"),
        ({"RAY_AUTH_MODE": "disabled"}, True, "disabled"),
    ],
)
def test_a_token_that_is_there_is_shown_to_the_cluster(
    environment: dict[str, str], has_file: bool, mode: str | None, tmp_path: Path
) -> None:
    file = tmp_path / "auth_token"
    if has_file:
        file.write_text("x")
    show_token(environment, file)
    assert environment.get("RAY_AUTH_MODE") == mode
