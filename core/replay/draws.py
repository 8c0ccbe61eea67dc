"""A draw, the states it can be in, the batch it may be in. Plain mutable data, owned by the ledger's state."""

from dataclasses import dataclass, field
from enum import StrEnum

from millrace.core.replay.journal import Location
from millrace.core.types import GroupVerdict


class State(StrEnum):
    """Every draw is in exactly one; from `in_step` on it is that of the group's first use."""

    WAITING = "waiting"  # for a generation worker
    LEASED = "leased"  # to one
    GENERATED = "generated"  # durable, waiting for a reward worker
    JUDGING = "judging"  # leased to one
    SCORED = "scored"  # may be taken
    IN_STEP = "in_step"  # in the recorded batch of a step
    TRAINED = "trained"  # that step's optimiser step was made
    COMMITTED = "committed"  # and is part of a checkpoint
    FILTERED = "filtered"  # by a rule of the recipe
    STALE = "stale"  # beyond max_lag
    DEAD = "dead"  # failed too often

    __hash__ = str.__hash__  # that of enumerations is not in C, and every move of a draw looks states up


OPEN = frozenset({State.LEASED, State.GENERATED, State.JUDGING, State.SCORED})
LIVE = OPEN | {State.IN_STEP}

CRASHES = frozenset({"crashed", "hung"})  # the worker's process, not an answer of it
JUDGE_CRASHED = "judge_crashed"
# Causes for which the next attempt samples with other seeds: what was sampled, not a machine, may be at fault.
ANEW = frozenset({"engine", "invalid", "judge", "judge_expired", JUDGE_CRASHED, "capped", "requeue"})
SUSPECT = 2  # crashes from which on a worker holds a draw without others like it
_REMEMBERED = 8  # workers that failed on a draw


@dataclass(slots=True)
class Draw:
    """One decision to roll out one prompt n times, and its present attempt."""

    index: int
    state: State = State.WAITING
    attempt: int = -1
    failures: int = 0  # attempts that count towards `dead`
    crashes: int = 0  # of engines that worked on it, since it was last generated
    judge_crashes: int = 0
    requeues: int = 0
    variation: int = 0  # of its seeds
    workers: list[str] = field(default_factory=list)  # that failed on it
    traceback: str = ""  # of the last failure that left one
    # of the present attempt
    epoch: int = 0  # of the generation worker that was granted it
    min_version: int = -1
    deadline: int = 0  # the last step it may be trained in
    tokens: int = 0  # so far
    runs: list[list[list[int]]] = field(default_factory=list)  # per rollout, (version, start, end)
    location: Location | None = None
    verdicts: list[list[object]] | None = None
    judged: GroupVerdict | None = field(default=None, compare=False)  # the same, as they came
    judge_failures: int = 0
    judge_expiries: int = 0
    shunned: str = ""  # the reward worker that failed on it
    shun_until: float = field(default=0.0, compare=False)
    steps: list[int] = field(default_factory=list)  # whose recorded batches hold it, one per use, ascending
    lags: list[int] = field(default_factory=list)  # per rollout, in the first of these steps
    rule: str = ""  # that filtered it

    def begin(self, attempt: int, epoch: int, version: int) -> None:
        """A fresh attempt; what earlier ones left is gone."""
        self.attempt, self.epoch, self.min_version = attempt, epoch, version
        self.tokens, self.runs, self.location, self.verdicts, self.judged = 0, [], None, None, None
        self.judge_failures = self.judge_expiries = 0
        self.shunned, self.steps, self.lags, self.rule = "", [], [], ""

    @property
    def suspect(self) -> bool:
        """It, or one of its neighbours, crashes engines."""
        return self.crashes >= SUSPECT

    @property
    def judge_suspect(self) -> bool:
        """It, or one of its neighbours, crashes judges."""
        return self.judge_crashes >= SUSPECT

    def blame(self, cause: str, worker: str, traceback: str) -> None:
        """Somebody failed on it."""
        self.crashes += cause in CRASHES
        self.judge_crashes += cause == JUDGE_CRASHED
        self.workers = [*self.workers, worker][-_REMEMBERED:]
        self.traceback = traceback or self.traceback

    def times(self, cause: str) -> int:
        """How often it failed for causes of this kind."""
        if cause in CRASHES:
            return self.crashes
        return self.judge_crashes if cause == JUDGE_CRASHED else self.failures


@dataclass(frozen=True, slots=True)
class Death:
    """What is remembered of a dead draw."""

    draw: int
    attempt: int
    cause: str
    times: int
    traceback: str
    workers: tuple[str, ...]


@dataclass(slots=True)
class Entry:
    """A group in a batch, with the lags it was taken with: a redone batch is the same batch."""

    draw: int
    attempt: int
    lags: list[int]  # per version run, in rollout order
    oldest: list[int]  # per rollout, the largest of its lags


@dataclass(slots=True)
class Batch:
    """The recorded batch of one step, in order."""

    entries: list[Entry] = field(default_factory=list)
    filtered: dict[int, str] = field(default_factory=dict)  # draw -> rule
    trained: tuple[int, int, int] | None = None  # (trained, masked, reused) tokens, once the optimiser step was made
    version: int = -1  # reserved for the weights after it

    def accepted(self, per_step: int) -> list[Entry]:
        """The first B that no rule filtered."""
        return [entry for entry in self.entries if entry.draw not in self.filtered][:per_step]


@dataclass(frozen=True, slots=True)
class Commit:
    """A checkpoint the ledger points to."""

    step: int
    directory: str | None = None
    digest: str | None = None
    epoch: int = 0


@dataclass(slots=True)
class Worker:
    """The present incarnation of a worker."""

    role: str
    epoch: int
    slots: int
    answers: dict[str, list[tuple[int, int]]] = field(default_factory=dict)  # request -> what it was leased

    def remember(self, request: str, ids: list[tuple[int, int]]) -> None:
        """The last few answers: a repeated request gets the same one."""
        self.answers[request] = ids
        while len(self.answers) > 16:
            del self.answers[next(iter(self.answers))]
