"""Who acts in the small world, what they hold, and how often each fault may happen."""

from dataclasses import dataclass, field
from itertools import pairwise

from millrace.core.schema import GroupHeader
from millrace.core.types import GroupId, Verdict, VerdictKind, VersionRun
from tests.core.replay.copies import by_constructor

OK = Verdict(kind=VerdictKind.SCORED, score=1.0)
BROKEN = Verdict(kind=VerdictKind.JUDGE_FAILED, score=None)


@dataclass(slots=True)
class Hand:
    """A group as its engine has it."""

    id: GroupId
    epoch: int
    runs: list[int]  # the version of each token
    seen_at: float  # when the ledger last saw progress
    granted_at: float
    known: int = 0  # tokens it last reported

    def copy(self) -> "Hand":
        return Hand(self.id, self.epoch, self.runs.copy(), self.seen_at, self.granted_at, self.known)

    def header(self, size: int) -> GroupHeader:
        """All tokens are the first rollout's; the others are empty."""
        bounds = [t for t in range(1, len(self.runs)) if self.runs[t] != self.runs[t - 1]]
        runs = tuple(VersionRun(self.runs[a], a, b) for a, b in pairwise([0, *bounds, len(self.runs)]))
        empty = ((VersionRun(self.runs[-1], 0, 0),),) * (size - 1)
        group = {"n": size, "tokens": len(self.runs), "oldest_version": min(self.runs)}
        return GroupHeader(id=self.id, lease_epoch=self.epoch, runs=(runs, *empty), **group)


@dataclass(slots=True)
class Engine:
    name: str
    epoch: int = 0
    version: int = -1
    counter: int = 0
    hands: list[Hand] = field(default_factory=list)
    old: list[Hand] = field(default_factory=list)  # put already, or of an earlier life
    failed: dict[GroupId, int] = field(default_factory=dict)  # tokens of groups it failed on, reported from then on

    def copy(self) -> "Engine":
        hands, old = [hand.copy() for hand in self.hands], [hand.copy() for hand in self.old]
        return Engine(self.name, self.epoch, self.version, self.counter, hands, old, self.failed.copy())


@dataclass(slots=True)
class Budget:
    """How often each fault may happen."""

    crash: int = 0
    judge_crash: int = 0
    learner_crash: int = 0
    tick: int = 0
    late: int = 0
    judge_fail: int = 0
    filter: int = 0
    work: int = 0
    beat: int = 0
    leave: int = 0
    revert: int = 0
    lose: int = 0
    fence: int = 0
    judge_fence: int = 0
    fail: int = 0
    queue_crash: int = 0

    def copy(self) -> "Budget":
        return _budget(self)


_budget = by_constructor(Budget)
