"""status.json: what a run does right now, for whoever can read its directory.

The driver replaces the file at every poll; a reader sees one moment, whole.
"""

import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from math import isfinite
from pathlib import Path
from typing import Any, Literal, Self, TypedDict

from millrace.cluster.lines import FULL

SCHEMA_VERSION = 1
FILE = "status.json"
BLOCK_BYTES = 4096  # what a file has in whole
LOST = "DriverLost"  # the kind of failure of a run whose driver ended without a word

State = Literal["starting", "running", "stopping", "finished", "stopped", "failed"]
ENDED: frozenset[State] = frozenset({"finished", "stopped", "failed"})


class Failure(TypedDict):
    """Why a run failed: the error's class in core/errors.py, and its message."""

    kind: str
    message: str


class Score(TypedDict):
    """A held-out evaluation; `mean` is null where every judgement failed."""

    step: int
    mean: float | None


class Lag(TypedDict):
    """Of the trained tokens of late, versions; and the bound."""

    mean: float
    max: int


class Rates(TypedDict):
    """Per second, of late."""

    generated_tokens_per_s: float
    trained_tokens_per_s: float
    samples_per_s: float


class LearnerNow(TypedDict):
    """What the learner does, since when, and what share of the time of late it waited for data."""

    phase: str
    phase_s: float
    wait_share: float


ComponentState = Literal["starting", "serving", "suspect", "restarting", "given up", "left"]


class ComponentNow(TypedDict):
    """One component: what it does, where, and how often it had to be started again."""

    state: ComponentState
    pid: int
    node: str
    restarts: int
    since_s: float  # unix, of this state


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """One moment of a run."""

    id: str  # the run directory, absolute
    state: State
    schema: int = SCHEMA_VERSION
    name: str = ""
    pid: int = field(default_factory=os.getpid)  # of the driver
    host: str = field(default_factory=socket.gethostname)
    error: Failure | None = None
    time_s: float = field(default_factory=time.time)  # of this moment, unix
    started_s: float = field(default_factory=time.time)  # of this incarnation, unix
    step: int = 0  # optimiser steps made
    steps: int = 0  # of the whole run
    committed_step: int = 0
    version: int = -1  # of the newest weights
    reward: float | None = None  # mean of the last step
    held_out: Score | None = None  # the newest
    lag: Lag = field(default_factory=lambda: Lag(mean=0.0, max=0))
    draws: Mapping[str, int] = field(default_factory=dict)  # by state
    tokens: Mapping[str, int] = field(default_factory=dict)  # generated ones, by what became of them
    rates: Rates = field(
        default_factory=lambda: Rates(generated_tokens_per_s=0.0, trained_tokens_per_s=0.0, samples_per_s=0.0)
    )
    learner: LearnerNow = field(default_factory=lambda: LearnerNow(phase="", phase_s=0.0, wait_share=0.0))
    waits: Mapping[str, str] = field(default_factory=dict)  # worker -> what it waits for
    components: Mapping[str, ComponentNow] = field(default_factory=dict)  # by name
    incidents: int = 0  # components lost, over all incarnations
    incident: str = ""  # the last of them
    idle: Mapping[str, float] = field(default_factory=dict)  # what the learner's time went on so far, shares
    quarantined: int = 0  # prompts that were given up
    note: str = ""  # what a run that was stopped left undone, and how it goes on
    eta_s: float | None = None

    @property
    def restarts(self) -> int:
        """Of all components, in this incarnation."""
        return sum(each["restarts"] for each in self.components.values())

    @property
    def down(self) -> dict[str, ComponentNow]:
        """Components that should serve and do not; while the run starts, all are only starting."""
        wrong = ("suspect", "restarting", "given up")
        return {
            name: each
            for name, each in self.components.items()
            if each["state"] in wrong or (each["state"] == "starting" and each["restarts"])
        }

    @property
    def ended(self) -> bool:
        """It will not change any more, unless the run is resumed."""
        return self.state in ENDED

    def to_json(self) -> str:
        """One line; numbers that JSON lacks become null."""
        try:
            return json.dumps(asdict(self), allow_nan=False)
        except ValueError:
            return json.dumps(_finite(asdict(self)), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What `to_json` wrote. Keys of a later release are left out.

        >>> moment = Status(id="runs/x", state="running", step=3)
        >>> Status.from_json(moment.to_json()) == moment
        True
        """
        known = {each.name for each in fields(cls)}
        return cls(**{key: value for key, value in json.loads(text).items() if key in known})


class Snapshot:
    """The last moment of the run that this process drives, in memory and in its file."""

    def __init__(self, directory: Path, **facts: Any) -> None:
        self.status = Status(id=str(directory), state="starting", **facts)
        self.listeners: list[Callable[[Status], None]] = []  # get every moment, too

    def update(self, **changes: Any) -> Status:
        """A new moment: what changed, now."""
        self.status = replace(self.status, time_s=time.time(), **changes)
        write(Path(self.status.id), self.status)
        for listener in self.listeners:
            listener(self.status)
        return self.status


def read(directory: Path) -> Status | None:
    """The run's last moment; None where there is none yet."""
    try:
        return Status.from_json((directory / FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def write(directory: Path, status: Status) -> None:
    """Replace the run's last moment; on a full disk in the room that the one before has."""
    partial, path = directory / f".{FILE}.partial", directory / FILE
    text = (status.to_json() + "\n").encode()
    try:
        partial.write_bytes(text)
        partial.replace(path)
    except OSError as caught:
        if caught.errno not in FULL or not path.exists():
            raise
        partial.unlink(missing_ok=True)
        size = path.stat().st_size
        if len(text) <= -(-size // BLOCK_BYTES) * BLOCK_BYTES:
            with path.open("r+b") as file:
                file.write(text.ljust(size))


def lost(status: Status) -> Status:
    """The last moment of a run whose driver has ended without a word: killed, or its machine went down."""
    message = (
        f"the driver, process {status.pid} on {status.host}, has ended without a word, at step {status.step} of "
        f"{status.steps}: it was killed, or its machine went down. What was committed, up to step "
        f"{status.committed_step}, stays: go on with `millrace train --resume {status.id}`, or Job.resume in Python; "
        "its last words are in driver.log there"
    )
    return replace(status, state="failed", error=Failure(kind=LOST, message=message), eta_s=None, waits={})


def cut_short(status: Status) -> str:
    """What is said of a run that was stopped before it could commit.

    >>> print(cut_short(Status(id="x", state="stopped", step=6, committed_step=5)))
    stopped during step 7 without a checkpoint; the last commit is step 5; continue with `millrace train --resume x`
    """
    go_on = f"continue with `millrace train --resume {status.id}`"
    if status.step <= 0 and not status.committed_step:
        return f"stopped before the first step was made; {go_on}"
    last = f"the last commit is step {status.committed_step}" if status.committed_step else "nothing was committed yet"
    return f"stopped during step {status.step + 1} without a checkpoint; {last}; {go_on}"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not isfinite(value) else value
