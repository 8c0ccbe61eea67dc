"""Everything the ledger knows, and the one way in which it changes: `apply(record)`.

Records are facts, not requests: a record is made by a rule (draw_rules.py, judge_rules.py, step_rules.py) after every
check, and applying it cannot fail. Applying the same records to a fresh state gives an equal state: equality leaves
out deadlines, which are counted from when this process learnt of a lease.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from heapq import heappop, heappush

from millrace.core.replay.draws import LIVE, OPEN, Batch, Commit, Draw, Entry, State, Worker
from millrace.core.replay.journal import Location, Record
from millrace.core.replay.leases import Hold, Leases
from millrace.core.replay.versions import Versions
from millrace.core.replay.waste import IN_FLIGHT, MASKED, QUEUED, TRAINED, Books, Meter

_ROWS = {
    State.LEASED: IN_FLIGHT,
    State.GENERATED: QUEUED,
    State.JUDGING: QUEUED,
    State.SCORED: QUEUED,
    State.IN_STEP: QUEUED,
}


@dataclass
class LedgerState:
    """The ledger's data. Rules read it; only `apply` writes it."""

    per_step: int
    max_lag: int
    draws: dict[int, Draw] = field(default_factory=dict)  # all that may still change
    next_draw: int = 0
    counts: dict[State, int] = field(default_factory=lambda: dict.fromkeys(State, 0))
    waiting: list[int] = field(default_factory=list)  # heap
    generated: dict[int, None] = field(default_factory=dict)  # in order of arrival
    scored: dict[int, None] = field(default_factory=dict)
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
    released: list[Location] = field(default_factory=list, compare=False)  # payloads nobody needs any more

    @property
    def live(self) -> int:
        return sum(self.counts[state] for state in LIVE)

    @property
    def open(self) -> int:
        return sum(self.counts[state] for state in OPEN)

    def apply(self, record: Record, now: float) -> None:
        """Make one record's change. `now` starts the clocks of the leases in it."""
        getattr(self, f"_{record['op']}")(record, now)

    # -- moving a draw keeps every index and every row of the books in step

    def _leave(self, draw: Draw) -> None:
        self.counts[draw.state] -= 1
        if row := _ROWS.get(draw.state):
            self.books.add(row, -draw.tokens)
        if draw.state in OPEN:
            _decrease(self.due, draw.deadline)
        if draw.state is State.GENERATED:
            del self.generated[draw.index]
        elif draw.state is State.SCORED:
            del self.scored[draw.index]
            _decrease(self.ready, draw.deadline)
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
        self._release(draw)
        draw.tokens = 0
        self._enter(draw, state)
        if state is not State.WAITING:
            del self.draws[draw.index]

    def _release(self, draw: Draw) -> None:
        if draw.location is not None:
            self.released.append(draw.location)
            draw.location = None

    # -- workers

    def _joined(self, record: Record, now: float) -> None:
        self.epochs = record["epoch"]
        self.workers[record["worker"]] = Worker(record["role"], record["epoch"], record["slots"])
        self.books.meters[record["epoch"]] = Meter(record["worker"], base=record["generated"])

    def _left(self, record: Record, now: float) -> None:
        del self.workers[record["worker"]]
        meter = self.books.meters[record["epoch"]]
        meter.counter, meter.final = record["generated"] - meter.base, True

    def _heard(self, record: Record, now: float) -> None:
        meter = self.books.meters[record["epoch"]]
        meter.counter = max(meter.counter, record["generated"] - meter.base)
        for index, attempt, tokens in record["progress"]:
            if hold := self.leases.holder(index, attempt, record["epoch"]):
                draw = self.draws[index]
                if tokens > draw.tokens:
                    self.books.add(IN_FLIGHT, tokens - draw.tokens)
                    meter.known += tokens - draw.tokens
                    draw.tokens = tokens
                self.leases.renew(hold, tokens, now)
            elif hold := self.judgings.holder(index, attempt, record["epoch"]):
                self.judgings.renew(hold, tokens, now)
            else:
                self._book_late(meter, index, attempt, tokens)

    def _late(self, record: Record, now: float) -> None:
        for index, attempt, tokens in record["rows"]:
            self._book_late(self.books.meters[record["epoch"]], index, attempt, tokens)

    def _book_late(self, meter: Meter, index: int, attempt: int, tokens: int) -> None:
        if (index, attempt) in meter.fenced:
            row, booked = meter.fenced[index, attempt]
            more = max(0, tokens - booked)
            self.books.add(row, more)
            meter.known += more
            meter.fenced[index, attempt] = (row, booked + more)

    # -- draws

    def _leased(self, record: Record, now: float) -> None:
        durations = (record["start_s"], record["lease_s"], record["cap_s"])
        for index, attempt in record["rows"]:
            if index == self.next_draw:
                self.next_draw += 1
                draw = self.draws[index] = Draw(index)
            else:
                draw = self.draws[heappop(self.waiting)]
                assert draw.index == index, f"draw {index} was leased before draw {draw.index}"
                self.counts[State.WAITING] -= 1
            draw.begin(attempt, record["epoch"], record["version"])
            draw.deadline = self._deadline(draw)
            self._enter(draw, State.LEASED)
            self.leases.grant(Hold(index, attempt, record["worker"], record["epoch"], *durations), now)
        ids = [(index, attempt) for index, attempt in record["rows"]]
        self.workers[record["worker"]].remember(record["request"], ids)

    def _generated(self, record: Record, now: float) -> None:
        for index, _attempt, tokens, runs, location in record["rows"]:
            draw = self.draws[index]
            self._leave(draw)
            self.books.meters[draw.epoch].known += tokens - draw.tokens
            draw.tokens, draw.runs, draw.location = tokens, runs, tuple(location)
            draw.deadline = self._deadline(draw)
            self._enter(draw, State.GENERATED)

    def _failed(self, record: Record, now: float) -> None:
        for index, _attempt, tokens, counted, state in record["rows"]:
            draw = self.draws[index]
            if draw.state is State.LEASED and tokens > draw.tokens:
                self.books.add(IN_FLIGHT, tokens - draw.tokens)
                self.books.meters[draw.epoch].known += tokens - draw.tokens
                draw.tokens = tokens
            draw.failures += counted
            self._end_attempt(draw, f"failed:{record['cause']}", State(state))

    def _stale(self, record: Record, now: float) -> None:
        for index, _attempt, state in record["rows"]:
            draw = self.draws[index]
            draw.requeues += state == State.WAITING
            self._end_attempt(draw, f"stale:{record['rule']}", State(state))

    # -- verdicts

    def _judging(self, record: Record, now: float) -> None:
        durations = (record["lease_s"], record["lease_s"], record["cap_s"])
        for index, attempt in record["rows"]:
            self._move(self.draws[index], State.JUDGING)
            self.judgings.grant(Hold(index, attempt, record["worker"], record["epoch"], *durations), now)
        ids = [(index, attempt) for index, attempt in record["rows"]]
        self.workers[record["worker"]].remember(record["request"], ids)

    def _returned(self, record: Record, now: float) -> None:
        for index, _attempt in record["rows"]:
            draw = self.draws[index]
            hold = self.judgings.held[index]
            if record["why"] == "failed":
                draw.judge_failures += 1
                draw.shunned, draw.shun_until = hold.worker, now + hold.lease_s
            elif record["why"] == "expired":
                draw.judge_expiries += 1
            self._move(draw, State.GENERATED)

    def _scored(self, record: Record, now: float) -> None:
        for index, _attempt, verdicts in record["rows"]:
            draw = self.draws[index]
            draw.verdicts = verdicts
            self._move(draw, State.SCORED)
            self.inserts += 1

    # -- steps

    def _took(self, record: Record, now: float) -> None:
        batch = self.batches.setdefault(record["step"], Batch())
        for index, attempt, lags, oldest in record["rows"]:
            draw = self.draws[index]
            draw.step = record["step"]
            batch.entries.append(Entry(index, attempt, lags, oldest))
            self._move(draw, State.IN_STEP)

    def _filtered(self, record: Record, now: float) -> None:
        batch = self.batches[record["step"]]
        for index, _attempt, rule in record["rows"]:
            draw = self.draws[index]
            batch.filtered[index] = draw.rule = rule
            self._move(draw, State.FILTERED)
            self.books.add(f"filtered:{rule}", draw.tokens)

    def _trained(self, record: Record, now: float) -> None:
        batch = self.batches[record["step"]]
        accepted = batch.accepted(self.per_step)
        kept = {entry.draw for entry in accepted}
        for entry in batch.entries:
            draw = self.draws[entry.draw]
            if entry.draw in kept:
                self._move(draw, State.TRAINED)
                for lag in entry.oldest:
                    self.lags[lag] = self.lags.get(lag, 0) + 1
            elif entry.draw not in batch.filtered:
                draw.step = -1
                self._move(draw, State.SCORED)
        batch.entries = [e for e in batch.entries if e.draw in kept or e.draw in batch.filtered]
        batch.trained, batch.version = (record["tokens"], record["masked"]), record["version"]
        self.books.add(TRAINED, record["tokens"])
        self.books.add(MASKED, record["masked"])
        self.step = record["step"] + 1
        self._reserve(record, self.step)

    def _announced(self, record: Record, now: float) -> None:
        self.versions.announce(record["version"])

    def _committed(self, record: Record, now: float) -> None:
        commit = Commit(record["step"], record["directory"], record["digest"], record["epoch"])
        for draw in self._drawn(k for k in self.batches if k < commit.step):
            if draw.state is State.TRAINED:
                self._move(draw, State.COMMITTED)
        earlier = [old for old in self.commits if old.step < commit.step]
        self.commits = [*earlier, commit][-record["keep"] :]
        for step in [k for k in self.batches if k < self.commits[0].step]:
            for draw in self._drawn([step]):
                self._release(draw)
                del self.draws[draw.index]
            del self.batches[step]

    def _reverted(self, record: Record, now: float) -> None:
        self.commits = [commit for commit in self.commits if commit.step <= record["step"]]
        for draw in self._drawn(k for k in self.batches if k >= record["step"]):
            if draw.state is State.COMMITTED:
                self._move(draw, State.TRAINED)

    def _rejoined(self, record: Record, now: float) -> None:
        self.epoch, self.step = record["epoch"], record["step"]
        for batch in (self.batches[k] for k in self.batches if k >= self.step):
            self._undo(batch)
        self.versions.fork(self.step)
        self._reserve(record, self.step)
        self.due, self.ready = {}, {}
        for draw in self.draws.values():
            if draw.state in LIVE:
                draw.deadline = self._deadline(draw)
            if draw.state in OPEN:
                self.due[draw.deadline] = self.due.get(draw.deadline, 0) + 1
                if draw.state is State.SCORED:
                    self.ready[draw.deadline] = self.ready.get(draw.deadline, 0) + 1

    def _lost(self, record: Record, now: float) -> None:
        for index, _attempt in record["rows"]:
            draw = self.draws[index]
            if draw.state is State.IN_STEP:
                batch = self.batches[draw.step]
                batch.entries = [entry for entry in batch.entries if entry.draw != index]
                if not batch.entries:
                    del self.batches[draw.step]
                draw.step = -1
            self._end_attempt(draw, "failed:lost", State.WAITING)

    def _undo(self, batch: Batch) -> None:
        """Its optimiser step is no part of history any more; its record stays, to be redone."""
        if batch.trained is not None:
            self.books.add(TRAINED, -batch.trained[0])
            self.books.add(MASKED, -batch.trained[1])
            for entry in batch.accepted(self.per_step):
                self._move(self.draws[entry.draw], State.IN_STEP)
                for lag in entry.oldest:
                    _decrease(self.lags, lag)
        for index, rule in batch.filtered.items():
            draw = self.draws[index]
            self.books.add(f"filtered:{rule}", -draw.tokens)
            draw.rule = ""
            self._move(draw, State.IN_STEP)
        batch.filtered, batch.trained, batch.version = {}, None, -1

    def _reserve(self, record: Record, step: int) -> None:
        version = self.versions.reserve(record["epoch"], step)
        assert version == record["version"], f"version {record['version']} was reserved, but {version} comes next"

    def _drawn(self, steps: Iterable[int]) -> list[Draw]:
        return [self.draws[entry.draw] for step in list(steps) for entry in self.batches[step].entries]


def _decrease(counts: dict[int, int], key: int) -> None:
    counts[key] -= 1
    if not counts[key]:
        del counts[key]
