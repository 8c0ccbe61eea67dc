"""The command line: what it says, and the status it ends with."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from millrace import __version__
from millrace.cluster import config as configs
from millrace.cluster import jobs
from millrace.cluster.cli import main, show_token, summary

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def run_file(make_run: Any, tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    configs.save(make_run(), path)
    return path


def ended(*arguments: str | Path) -> int:
    """The status that the command ends with."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as caught:
        return int(caught.code or 0)
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
    for word in ("RUN.toml", "key=value", "--resume", "--dry-run", "--address", "--local"):
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


def test_what_fails_ends_with_status_1(run_file: Path, capsys: Capture) -> None:
    assert ended("train", run_file, "data.train=nowhere.jsonl", "--local") == 1
    assert "nowhere.jsonl: there is no such file" in capsys.readouterr().err


def test_an_interrupt_ends_with_status_130(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*given: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "train", interrupted)
    assert ended("train", run_file) == 130


def test_a_run_ends_with_its_summary_and_status_0(run_file: Path, capsys: Capture) -> None:
    assert ended("train", run_file, "loop.steps=2", "--local") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("run        run -> ")
    assert any(line.startswith("finished after 2 steps in ") for line in said)
    assert any(line.startswith("training reward 0.") and " -> " in line for line in said)
    assert any(line.startswith("held-out reward 0.") for line in said)
    assert any(line.startswith('tokens {"generated": ') and '"unaccounted": 0}' in line for line in said)
    assert said[-1] == str(run_file.parent / "runs" / "run" / "result.json")


def test_a_summary_without_scores_is_words() -> None:
    found = {"ended": "stopped", "steps": 0, "seconds": 0.0, "directory": "x", "reward": None}
    assert summary({**found, "held_out": {"first": {"mean": None}, "last": {"mean": 0.5}}}).splitlines() == [
        "stopped after 0 steps in 0 s",
        "held-out reward no score -> 0.500",
        "x/result.json",
    ]


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
