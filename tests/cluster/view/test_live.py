"""Following reads only what is new, ends with the job, and degrades to lines."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from millrace.cluster.snapshot import Status
from millrace.cluster.view.live import KEPT_STEPS, Feed, follow


def write(path: Path, *rows: dict[str, Any], mode: str = "a") -> None:
    with path.open(mode) as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def step(number: int) -> dict[str, Any]:
    return {"step": number, "reward/mean": number / 10}


def evaluation(number: int) -> dict[str, Any]:
    return {"step": number, "held_out/mean": 0.5, "held_out": {"step": number, "mean": 0.5}}


class Job:
    """Makes a step whenever somebody waits."""

    def __init__(self, directory: Path, *, steps: int, state: str = "finished") -> None:
        self.directory, self.steps, self.made, self.end = directory, steps, 0, state

    def status(self) -> Status:
        done = self.made >= self.steps
        error: Any = {"kind": "RewardError", "message": "it broke"} if done and self.end == "failed" else None
        state: Any = self.end if done else "running"
        return Status(id="x", state=state, name="sorting", step=self.made, steps=self.steps, error=error)

    def lines(self) -> Iterator[str]:
        yield "step 1/2  reward [0.5]"
        yield "step 2/2  reward [1.0]"

    def sleep(self, _seconds: float) -> None:
        self.made += 1
        write(self.directory / "metrics.jsonl", step(self.made))


def terminal(*, width: int = 80, height: int = 24, **environment: str) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=True, width=width, height=height, _environ=environment), out


def test_every_line_is_read_once(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    feed = Feed(tmp_path)
    feed.read()
    assert feed.rows == [], "before there is a file"
    write(metrics, evaluation(0), step(1))
    with metrics.open("a") as file:
        file.write('{"step": 2, "rew')
    feed.read()
    assert [row["step"] for row in feed.rows] == [0, 1], "a torn line is left for later"
    with metrics.open("a") as file:
        file.write('ard/mean": 0.2}\n')
    metrics.write_bytes(b"#" * len(json.dumps(evaluation(0))) + metrics.read_bytes()[len(json.dumps(evaluation(0))) :])
    feed.read()
    assert [row["step"] for row in feed.rows] == [0, 1, 2], "what was read is not looked at again"


def test_steps_that_are_made_again_replace_the_ones_before(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    feed = Feed(tmp_path)
    write(metrics, evaluation(0), *map(step, range(1, 8)), evaluation(5))
    feed.read()
    partial = tmp_path / "metrics.partial"
    write(partial, evaluation(0), *map(step, range(1, 5)))
    partial.replace(metrics)  # as a run does that resumes from its commit of step 4
    feed.read()
    write(metrics, {**step(5), "time_s": 2.0}, {**evaluation(5), "time_s": 2.0})
    feed.read()
    assert [row["step"] for row in feed.steps] == [1, 2, 3, 4, 5]
    assert [row["step"] for row in feed.evaluations] == [0, 5]


def test_a_long_run_does_not_fill_the_memory(tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", evaluation(0), *map(step, range(1, KEPT_STEPS + 51)))
    feed = Feed(tmp_path)
    feed.read()
    assert (len(feed.steps), feed.steps[0]["step"]) == (KEPT_STEPS, 51)
    assert [row["step"] for row in feed.evaluations] == [0]


@pytest.mark.parametrize(
    ("text", "recipe"),
    [('recipe = "grpo"\n', "grpo"), ('[recipe]\norigin = "mine.toml"\n', "mine.toml"), ("", "")],
)
def test_the_recipe_is_the_configuration_s(tmp_path: Path, text: str, recipe: str) -> None:
    (tmp_path / "config.toml").write_text(text)
    feed = Feed(tmp_path)
    feed.read()
    assert feed.recipe == recipe


def test_it_ends_with_the_job_and_leaves_the_last_picture(tmp_path: Path) -> None:
    console, out = terminal()
    job = Job(tmp_path, steps=3)
    follow(job, console=console, sleep=job.sleep)
    during, _, after = out.getvalue().rpartition("\x1b[?1049l")
    assert "\x1b[?1049h" in during, "the other screen is left again"
    assert during.count("step ") >= 3
    assert "finished" in after and "3/3" in after and "steps 1–3" in after


def test_a_failure_stays_on_the_screen(tmp_path: Path) -> None:
    console, out = terminal(height=6)
    job = Job(tmp_path, steps=1, state="failed")
    follow(job, console=console, sleep=job.sleep)
    assert "RewardError: it broke" in out.getvalue().rpartition("\x1b[?1049l")[2]


def test_an_interrupt_gives_the_terminal_back(tmp_path: Path) -> None:
    console, out = terminal()

    def interrupted(_seconds: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        follow(Job(tmp_path, steps=1), console=console, sleep=interrupted)
    assert out.getvalue().rstrip().endswith(("\x1b[?1049l", "\x1b[?25h"))


@pytest.mark.parametrize("make", [lambda out: Console(file=out), lambda out: terminal_dumb(out)])
def test_without_a_terminal_there_are_lines(tmp_path: Path, make: Callable[[io.StringIO], Console]) -> None:
    out = io.StringIO()
    follow(Job(tmp_path, steps=2), console=make(out))
    assert out.getvalue().splitlines() == ["step 1/2  reward [0.5]", "step 2/2  reward [1.0]"]


def terminal_dumb(out: io.StringIO) -> Console:
    return Console(file=out, force_terminal=True, _environ={"TERM": "dumb"})


def test_no_color_is_respected(tmp_path: Path) -> None:
    console, out = terminal(NO_COLOR="1")
    job = Job(tmp_path, steps=2)
    follow(job, console=console, sleep=job.sleep)
    assert "\x1b[32m" not in out.getvalue() and "\x1b[36m" not in out.getvalue()
    coloured, seen = terminal(TERM="xterm")
    again = Job(tmp_path, steps=2)
    follow(again, console=coloured, sleep=again.sleep)
    assert "\x1b[1;36m" in seen.getvalue()
