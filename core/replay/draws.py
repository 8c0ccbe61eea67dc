"""A draw, the states it can be in, the batch it may be in. Plain mutable data, owned by the ledger's state."""

from dataclasses import dataclass, field
from enum import StrEnum

from millrace.core.replay.journal import Location


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


OPEN = frozenset({State.LEASED, State.GENERATED, State.JUDGING, State.SCORED})
LIVE = OPEN | {State.IN_STEP}


@dataclass(slots=True)
class Draw:
    """One decision to roll out one prompt n times, and its present attempt."""

    index: int
    state: State = State.WAITING
    attempt: int = -1
    failures: int = 0  # attempts that count towards `dead`
    requeues: int = 0
    # of the present attempt
    epoch: int = 0  # of the generation worker that was granted it
    min_version: int = -1
    deadline: int = 0  # the last step it may be trained in
    tokens: int = 0  # so far
    runs: list[list[list[int]]] = field(default_factory=list)  # per rollout, (version, start, end)
    location: Location | None = None
    verdicts: list[list[object]] | None = None
    judge_failures: int = 0
    judge_expiries: int = 0
    shunned: str = ""  # the reward worker that failed on it
    shun_until: float = field(default=0.0, compare=False)
    steps: list[int] = field(default_factory=list)  # whose recorded batches hold it, one per use, ascending
    rule: str = ""  # that filtered it

    def begin(self, attempt: int, epoch: int, version: int) -> None:
        """A fresh attempt; what earlier ones left is gone."""
        self.attempt, self.epoch, self.min_version = attempt, epoch, version
        self.tokens, self.runs, self.location, self.verdicts = 0, [], None, None
        self.judge_failures = self.judge_expiries = 0
        self.shunned, self.steps, self.rule = "", [], ""


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
