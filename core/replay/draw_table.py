"""The ledger's data, and the moves that keep every index, count and row of the books in step with the draws."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

from millrace.core.replay.draws import LIVE, OPEN, Batch, Commit, Death, Draw, State, Worker
from millrace.core.replay.journal import Outcome
from millrace.core.replay.leases import Leases
from millrace.core.replay.versions import Versions, possible
from millrace.core.replay.waste import IN_FLIGHT, QUEUED, Books

_ROWS = {
    State.LEASED: IN_FLIGHT,
    State.GENERATED: QUEUED,
    State.JUDGING: QUEUED,
    State.SCORED: QUEUED,
    State.IN_STEP: QUEUED,
}


@dataclass
class DrawTable:
    """The ledger's data, and the moves of which every record is made."""

    per_step: int
    max_lag: int
    steps: int  # of the run
    reuse: int  # uses of a group, at most
    draws: dict[int, Draw] = field(default_factory=dict)  # all that may still change
    next_draw: int = 0
    counts: dict[State, int] = field(default_factory=lambda: dict.fromkeys(State, 0))
    waiting: list[int] = field(default_factory=list)  # heap
    generated: dict[int, None] = field(default_factory=dict)  # in order of arrival
    scored: dict[int, None] = field(default_factory=dict)
    reusable: dict[int, None] = field(default_factory=dict)  # all their uses are trained, and they may have another
    further: int = 0  # uses that the groups of recorded batches, and the reusable, may still have
    due: dict[int, int] = field(default_factory=dict)  # deadline -> open groups
    ready: dict[int, int] = field(default_factory=dict)  # deadline -> scored ones
    batches: dict[int, Batch] = field(default_factory=dict)  # by step, ascending
    step: int = 0  # trained
    epoch: int = 0  # of the learner
    commits: list[Commit] = field(default_factory=lambda: [Commit(0)])
    versions: Versions = field(default_factory=Versions)
    workers: dict[str, Worker] = field(default_factory=dict)
    epochs: int = 0  # of workers, all together
    leases: Leases = field(default_factory=Leases)
    judgings: Leases = field(default_factory=Leases)
    books: Books = field(default_factory=Books)
    lags: dict[int, int] = field(default_factory=dict)  # lag of the oldest token -> trained rollouts
    inserts: int = 0  # groups ever scored
    quarantined: list[Death] = field(default_factory=list)  # oldest first
    lengths: dict[int, list[int]] = field(default_factory=dict)  # tokens of a rollout -> how many ended, trained
    released: list[Outcome] = field(default_factory=list, compare=False)  # groups whose payload nobody needs any more

    @property
    def live(self) -> int:
        return sum(self.counts[state] for state in LIVE)

    @property
    def open(self) -> int:
        return sum(self.counts[state] for state in OPEN)

    def _leave(self, draw: Draw) -> None:
        self.counts[draw.state] -= 1
        if row := _ROWS.get(draw.state):
            self.books.add(row, -draw.tokens)
        if draw.state in OPEN:
            decrease(self.due, draw.deadline)
        if draw.state is State.GENERATED:
            del self.generated[draw.index]
        elif draw.state is State.SCORED:
            del self.scored[draw.index]
            decrease(self.ready, draw.deadline)
        elif draw.state is State.LEASED:
            self.leases.end(draw.index)
        elif draw.state is State.JUDGING:
            self.judgings.end(draw.index)

    def _enter(self, draw: Draw, state: State) -> None:
        draw.state = state
        self.counts[state] += 1
        if row := _ROWS.get(state):
            self.books.add(row, draw.tokens)
        if state in OPEN:
            self.due[draw.deadline] = self.due.get(draw.deadline, 0) + 1
        if state is State.GENERATED:
            self.generated[draw.index] = None
        elif state is State.SCORED:
            self.scored[draw.index] = None
            self.ready[draw.deadline] = self.ready.get(draw.deadline, 0) + 1
        elif state is State.WAITING:
            heappush(self.waiting, draw.index)

    def _unwait(self, index: int) -> Draw:
        """Take a draw off the waiting ones; nearly always it is the first."""
        if self.waiting[0] == index:
            heappop(self.waiting)
        else:
            self.waiting.remove(index)
            heapify(self.waiting)
        self.counts[State.WAITING] -= 1
        return self.draws[index]

    def _move(self, draw: Draw, state: State) -> None:
        self._leave(draw)
        self._enter(draw, state)

    def _deadline(self, draw: Draw) -> int:
        """Of its oldest token by lag; of the version it was granted at while no tokens are known."""
        versions = {run[0] for runs in draw.runs for run in runs} or {draw.min_version}
        return min(self.versions.deadline(version, self.max_lag) for version in versions)

    def _end_attempt(self, draw: Draw, row: str, state: State) -> None:
        """Book its tokens under `row`, for good, and let the draw go on without them."""
        leased = draw.state is State.LEASED
        self._leave(draw)
        self.books.add(row, draw.tokens)
        if leased:  # its engine may go on until it is told; what it reports later goes to the same row
            self.books.meters[draw.epoch].fenced[draw.index, draw.attempt] = (row, draw.tokens)
        self._release(draw, row)
        draw.tokens = 0
        self._enter(draw, state)
        if state is not State.WAITING:
            del self.draws[draw.index]

    def _release(self, draw: Draw, row: str = "") -> None:
        """Its payload goes; its fate is its state, or the row that its tokens are booked under."""
        if draw.location is not None:
            self.released.append(self.outcome(draw, row))
            add_lengths(self.lengths, draw)
            draw.location = None

    def outcome(self, draw: Draw, row: str = "") -> Outcome:
        """What is known of a group that has a payload."""
        assert draw.location is not None, f"draw {draw.index} has no payload"
        state, _, rule = row.partition(":") if row else (draw.state.value, "", draw.rule)
        facts = (tuple(draw.steps), rule, draw.verdicts, tuple(draw.lags if draw.steps else ()))
        return Outcome(draw.location, draw.index, draw.attempt, state, *facts)

    # -- further uses

    def _withdraw(self, draw: Draw, since: int) -> None:
        """Take it out of the recorded batches from `since` on; others fill its places."""
        for batch in (self.batches[step] for step in draw.steps if step >= since):
            batch.entries = [entry for entry in batch.entries if entry.draw != draw.index]
        draw.steps = [step for step in draw.steps if step < since]

    def _count_further(self) -> None:
        """After every change of batches. What can have no further use is not reusable any more."""
        total = 0
        for index in list(self.reusable):
            draw = self.draws[index]
            if uses := self._possible(draw, self.step):
                total += uses
            else:
                del self.reusable[index]
                self._let_go(draw)
        if self.reuse > 1:
            for step in (k for k in self.batches if k >= self.step):
                kept = (draw for draw in self._drawn([step]) if draw.index not in self.batches[step].filtered)
                total += sum(self._possible(draw, step + 1) for draw in kept if draw.steps[-1] == step)
        self.further = total

    def _possible(self, draw: Draw, first: int) -> int:
        """Its uses beyond those recorded, from step `first` on."""
        return possible(self.reuse - len(draw.steps), first=first, last=min(draw.deadline, self.steps - 1))

    def _let_go(self, draw: Draw) -> None:
        """Its payload goes with the last batch that holds it, when it can enter no other."""
        if draw.index not in self.reusable and not any(step in self.batches for step in draw.steps):
            self._release(draw)
            del self.draws[draw.index]

    def _drawn(self, steps: Iterable[int]) -> list[Draw]:
        return [self.draws[entry.draw] for step in list(steps) for entry in self.batches[step].entries]


def add_lengths(lengths: dict[int, list[int]], draw: Draw) -> None:
    """Count a group's rollouts by their length: all, and those that were trained."""
    trained = draw.state in (State.TRAINED, State.COMMITTED)
    for runs in draw.runs:
        length = runs[0][2] - runs[0][1] if len(runs) == 1 else sum(end - start for _, start, end in runs)
        counts = lengths.setdefault(length, [0, 0])
        counts[0] += 1
        counts[1] += trained


def decrease(counts: dict[int, int], key: int) -> None:
    """One less; what falls to zero leaves."""
    counts[key] -= 1
    if not counts[key]:
        del counts[key]
