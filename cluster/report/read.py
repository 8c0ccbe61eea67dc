"""What a run directory holds, whatever state the run is in. What is not there is said, and nothing fails for it."""

import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from millrace.cluster import config as configs
from millrace.cluster import snapshot
from millrace.cluster.config import RunConfig
from millrace.cluster.run_directory import CONFIG, EVENTS, METRICS, RESULT, ROLLOUTS, is_held
from millrace.cluster.snapshot import Status
from millrace.core.errors import ConfigError, MillraceError

Row = Mapping[str, Any]

ENDS = {"finished": "finished", "stopped": "stopped", "failed": "failed", "interrupted": "stopped"}  # event -> state
BEGINS = ("started", "resumed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A run directory, read."""

    directory: Path
    table: Row  # config.toml as it stands
    config: RunConfig | None  # the same, checked; None where this release refuses it
    rows: list[Row]  # of metrics.jsonl, one per step
    held_out: list[Row]  # evaluations, by step
    events: list[Row]
    status: Row  # of status.json; empty where there is none
    result: Row  # of result.json; empty where there is none, or an earlier incarnation left it
    rollouts: list[Row]
    missing: list[str] = field(default_factory=list)  # what is not there, and why it may be so

    @property
    def supervised(self) -> bool:
        """It learns from the data's answers: nothing is generated or judged."""
        return bool(self.rows) and not any("reward/mean" in row for row in self.rows)

    @property
    def state(self) -> str:
        """checking | starting | running | stopping | finished | stopped | failed"""
        if "state" in self.status:
            return str(self.status["state"])
        for event in reversed(self.events):
            if event["kind"] in ENDS:
                return ENDS[event["kind"]]
            if event["kind"] in BEGINS:
                return "running"
        return str(self.result.get("ended", "running"))

    @property
    def error(self) -> str:
        """Why it failed; "" if it did not."""
        if self.state != "failed":
            return ""
        if self.status.get("error"):
            return f"{self.status['error']['kind']}: {self.status['error']['message']}"
        return next((str(event["cause"]) for event in reversed(self.events) if event["kind"] == "failed"), "")

    @property
    def tokens(self) -> Mapping[str, int]:
        """The waste ledger, of the best source there is; empty where nobody kept it."""
        for source in (self.result.get("waste"), self.status.get("tokens")):
            if source:
                return dict(source)
        prefix = "waste/"
        last = self.rows[-1] if self.rows else {}
        return {name.removeprefix(prefix): tokens for name, tokens in last.items() if name.startswith(prefix)}


def read(directory: Path) -> Found:
    """Read a run directory.

    Raises:
        ConfigError: it is none.
    """
    if not (directory / CONFIG).is_file():
        raise ConfigError(f"{directory}: is no run directory, it has no config.toml; give the one that holds the run")
    missing: list[str] = []
    metrics = _lines(directory / METRICS, missing)
    events = _lines(directory / EVENTS, missing)
    found = Found(
        directory=directory.resolve(),
        table=_table(directory / CONFIG, missing),
        config=_config(directory, missing),
        rows=[row for row in metrics if "held_out" not in row],
        held_out=sorted((row["held_out"] for row in metrics if "held_out" in row), key=lambda each: int(each["step"])),
        events=events,
        status=_status(directory, missing),
        result=_of_this_incarnation(_object(directory / RESULT, missing), events, missing),
        rollouts=_lines(directory / ROLLOUTS, missing),
        missing=missing,
    )
    missing.extend(_absent(found))
    return found


def _table(path: Path, missing: list[str]) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as caught:
        missing.append(f"config.toml cannot be read: {caught}")
        return {}


def _config(directory: Path, missing: list[str]) -> RunConfig | None:
    try:
        return configs.of_directory(directory)
    except MillraceError as caught:
        missing.append(f"This release refuses config.toml, so that its formula cannot be shown: {caught}")
        return None


def _object(path: Path, missing: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except ValueError as caught:  # of JSON or of UTF-8
        missing.append(f"{path.name} cannot be read: {caught}")
        return {}
    return found if isinstance(found, dict) else {}


def _status(directory: Path, missing: list[str]) -> Row:
    """The last moment of the run; of one whose driver is gone without a word, that it failed."""
    held = is_held(directory)  # asked first: it may end meanwhile, and says so before it lets go
    status = _object(directory / snapshot.FILE, missing)
    if held or not status or status.get("state") in snapshot.ENDED:
        return status
    return asdict(snapshot.lost(Status.from_json(json.dumps(status))))


def _lines(path: Path, missing: list[str]) -> list[Row]:
    """The rows of a file that may be written right now: its last line may be half there."""
    if not path.is_file():
        return []
    *whole, torn = path.read_bytes().split(b"\n")
    rows, unreadable = [], 0
    for line in whole:
        try:
            rows.append(json.loads(line, parse_constant=lambda _: None))  # NaN, of whoever wrote it
        except ValueError:
            unreadable += 1
    if unreadable:
        missing.append(f"{unreadable} lines of {path.name} cannot be read and are left out.")
    if torn:
        missing.append(f"The last line of {path.name} is cut off and left out: it was being written.")
    return rows


def _of_this_incarnation(result: dict[str, Any], events: list[Row], missing: list[str]) -> dict[str, Any]:
    """A resumed run still has the result.json of the time before, until it ends again."""
    last = next((event["kind"] for event in reversed(events) if event["kind"] in (*BEGINS, *ENDS)), None)
    if not result or last in (None, "finished", "stopped"):
        return result
    missing.append("result.json was left by an earlier incarnation of this run; its numbers are not shown.")
    return {}


def _absent(found: Found) -> list[str]:
    """What a reader may look for in vain."""
    said = []
    if not found.rows:
        said.append("No step has been made yet: metrics.jsonl has no row of one.")
    if found.supervised:
        said.append("A supervised run: it generates and judges nothing, so there are losses only.")
        return said
    if found.rows and not found.held_out:
        said.append("No held-out evaluation: the run has no data.held_out, or the first is not done.")
    if not found.result:
        said.append("No result.json: the run has not come to its end.")
    if found.rows and not found.rollouts:
        said.append("No sample rollouts: learner.samples_per_step is 0, or the run was made by an older release.")
    if found.rows and not any(name.startswith("waste/") for name in found.rows[-1]):
        said.append("metrics.jsonl has no waste columns: what was generated but not trained is known for the end only.")
    return said
