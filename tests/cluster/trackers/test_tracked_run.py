"""A whole run in this process tells its trackers what it writes down, and goes on without them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from millrace.cluster import jobs
from millrace.cluster.snapshot import Status
from millrace.cluster.trackers import kinds
from millrace.cluster.trackers.kinds import Kind
from millrace.core.config import Config
from millrace.core.errors import ConfigError


class Settings(Config):
    """Of the one below."""

    broken: bool = False
    """It raises at every step."""


class Ours:
    """Keeps what it is told."""

    last: "Ours"

    def __init__(self, settings: Settings, package: Any) -> None:
        Ours.last = self
        self.broken, self.package = settings.broken, package
        self.steps: list[int] = []
        self.evaluated_at: list[int] = []
        self.states: list[str] = []
        self.ended = ""

    def start(self, config: Mapping[str, Any], directory: Path) -> str:
        self.config = json.loads(json.dumps(config))
        return str(directory)

    def step(self, step: int, row: Mapping[str, Any]) -> None:
        if self.broken:
            raise ConnectionError("no route to host")
        self.steps.append(step)

    def evaluated(self, step: int, row: Mapping[str, Any]) -> None:
        self.evaluated_at.append(step)

    def moment(self, status: Status) -> None:
        self.states.append(status.state)

    def finish(self, status: Status) -> None:
        self.ended = status.state


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kinds.KINDS, "ours", Kind(Settings, Ours, "json", "-"))


def events(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "events.jsonl").read_text().splitlines()]


def test_every_row_and_the_end_are_told(make_run: Any) -> None:
    config = make_run(tracking=["ours"])
    said: list[str] = []
    jobs.train(config, local=True, say=said.append)
    told = Ours.last
    assert told.config["loop"]["steps"] == config.loop.steps
    assert told.package is json
    assert told.steps == list(range(1, config.loop.steps + 1))
    assert told.evaluated_at[0] == 0 and len(told.evaluated_at) == 4
    assert told.states[-1] == "finished" == told.ended
    assert f"tracking ours: {config.directory}" in said
    assert events(config.directory)[0]["kind"] == "tracking"


def test_a_tracker_that_raises_is_an_event_and_not_the_end(make_run: Any) -> None:
    config = make_run(tracking=[{"name": "ours", "broken": True}])
    found = jobs.train(config, local=True, say=lambda line: None)
    assert found["ended"] == "finished"
    causes = [event["cause"] for event in events(config.directory) if event["kind"] == "tracker failed"]
    assert causes == ["tracker ours raised ConnectionError: no route to host"]


def test_a_run_that_fails_is_told_as_failed(make_run: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def score(text):\n    raise KeyError('no such column')\n")
    config = make_run(
        tracking=["ours"],
        rewards={"verifier": f"{tmp_path}/mine.py:score", "max_judge_failures": 8},
        evaluation={"every": 1000},
    )
    with pytest.raises(Exception, match="no such column"):
        jobs.train(config, local=True, say=lambda line: None)
    assert Ours.last.ended == "failed"


def test_a_mistake_in_it_is_found_before_the_run(make_run: Any) -> None:
    config = make_run(tracking=[{"name": "ours", "brokn": True}])
    with pytest.raises(ConfigError, match="tracking ours: unknown key 'brokn'|did you mean 'broken'"):
        jobs.dry_run(config)
