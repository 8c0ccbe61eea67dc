"""Everything the ledger knows, and the one way in which it changes: `apply(record)`.

Records are facts, not requests: a record is made by a rule (draw_rules.py, judge_rules.py, step_rules.py) after every
check, and applying it cannot fail. Applying the same records to a fresh state gives an equal state: equality leaves
out deadlines, which are counted from when this process learnt of a lease.
"""

from dataclasses import dataclass

from millrace.core.replay.draw_table import DrawTable, decrease
from millrace.core.replay.draws import (
    ANEW,
    CRASHES,
    JUDGE_CRASHED,
    LIVE,
    OPEN,
    Batch,
    Commit,
    Death,
    Draw,
    Entry,
    State,
    Worker,
)
from millrace.core.replay.image import restore
from millrace.core.replay.journal import Record
from millrace.core.replay.leases import Hold
from millrace.core.replay.waste import IN_FLIGHT, MASKED, REUSED, TRAINED, Meter


@dataclass
class LedgerState(DrawTable):
    """The ledger's data. Rules read it; only `apply` writes it."""

    def apply(self, record: Record, now: float) -> None:
        """Make one record's change. `now` starts the clocks of the leases in it."""
        getattr(self, f"_{record['op']}")(record, now)

    def _image(self, record: Record, now: float) -> None:
        """What all records before it led to."""
        restore(self, record)

    # -- workers

    def _joined(self, record: Record, now: float) -> None:
        self.epochs = record["epoch"]
        self.workers[record["worker"]] = Worker(record["role"], record["epoch"], record["slots"])
        self.books.meters[record["epoch"]] = Meter(record["worker"], base=record["generated"])

    def _left(self, record: Record, now: float) -> None:
        del self.workers[record["worker"]]
        meter = self.books.meters[record["epoch"]]
        meter.counter, meter.final = record["generated"] - meter.base, True

    def _gone(self, record: Record, now: float) -> None:
        """Its counter stays what it last reported: what it sampled since then, nobody knows."""
        del self.workers[record["worker"]]

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
                draw = self._unwait(index)
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
            draw.crashes = 0
            draw.deadline = self._deadline(draw)
            self._enter(draw, State.GENERATED)

    def _failed(self, record: Record, now: float) -> None:
        cause = record["cause"]
        for index, attempt, tokens, counted, state, traceback in record["rows"]:
            draw = self.draws[index]
            if draw.state is State.LEASED and tokens > draw.tokens:
                self.books.add(IN_FLIGHT, tokens - draw.tokens)
                self.books.meters[draw.epoch].known += tokens - draw.tokens
                draw.tokens = tokens
            draw.failures += counted
            if counted or cause in CRASHES or cause == JUDGE_CRASHED:
                hold = self.leases.held.get(index) or self.judgings.held[index]
                draw.blame(cause, hold.worker, traceback)
            draw.variation += cause in ANEW
            if state == State.DEAD:
                blamed = (draw.times(cause), draw.traceback, tuple(draw.workers))
                self.quarantined.append(Death(index, attempt, cause, *blamed))
            self._end_attempt(draw, f"failed:{cause}", State(state))

    def _stale(self, record: Record, now: float) -> None:
        for index, _attempt, state in record["rows"]:
            draw = self.draws[index]
            draw.requeues += state == State.WAITING
            draw.variation += record["rule"] in ANEW
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
            elif record["why"] == "crashed":
                draw.blame(JUDGE_CRASHED, hold.worker, record["traceback"])
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
            draw.lags = draw.lags if draw.steps else oldest
            draw.steps.append(record["step"])
            batch.entries.append(Entry(index, attempt, lags, oldest))
            if draw.state is State.SCORED:
                self._move(draw, State.IN_STEP)
            else:
                del self.reusable[index]
        self._count_further()

    def _filtered(self, record: Record, now: float) -> None:
        batch = self.batches[record["step"]]
        for index, _attempt, rule in record["rows"]:
            draw = self.draws[index]
            batch.filtered[index] = draw.rule = rule
            self._withdraw(draw, record["step"] + 1)
            if draw.steps[0] == record["step"]:
                self._move(draw, State.FILTERED)
                self.books.add(f"filtered:{rule}", draw.tokens)
        self._count_further()

    def _trained(self, record: Record, now: float) -> None:
        step, batch = record["step"], self.batches[record["step"]]
        kept = {entry.draw for entry in batch.accepted(self.per_step)}
        for entry in batch.entries:
            draw = self.draws[entry.draw]
            if entry.draw in kept:
                if draw.steps[0] == step:
                    self._move(draw, State.TRAINED)
                for lag in entry.oldest:
                    self.lags[lag] = self.lags.get(lag, 0) + 1
            elif entry.draw not in batch.filtered:
                draw.steps.remove(step)
                if not draw.steps:
                    self._move(draw, State.SCORED)
            if entry.draw not in batch.filtered and draw.steps and draw.steps[-1] <= step:
                self.reusable[entry.draw] = None
        batch.entries = [e for e in batch.entries if e.draw in kept or e.draw in batch.filtered]
        batch.trained, batch.version = (record["tokens"], record["masked"], record.get("reused", 0)), record["version"]
        self._book(batch.trained, 1)
        self.step = step + 1
        self._reserve(record, self.step)
        self._count_further()

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
            drawn = self._drawn([step])
            del self.batches[step]
            for draw in drawn:
                self._let_go(draw)

    def _reverted(self, record: Record, now: float) -> None:
        self.commits = [commit for commit in self.commits if commit.step <= record["step"]]
        for draw in self._drawn(k for k in self.batches if k >= record["step"]):
            if draw.state is State.COMMITTED and draw.steps[0] >= record["step"]:
                self._move(draw, State.TRAINED)

    def _rejoined(self, record: Record, now: float) -> None:
        self.epoch, self.step = record["epoch"], record["step"]
        for step in [k for k in self.batches if k >= self.step]:
            self._undo(step, self.batches[step])
        self.versions.fork(self.step)
        self._reserve(record, self.step)
        self.due, self.ready = {}, {}
        for draw in self.draws.values():
            if draw.state in LIVE or draw.steps:
                draw.deadline = self._deadline(draw)
            if draw.state in OPEN:
                self.due[draw.deadline] = self.due.get(draw.deadline, 0) + 1
                if draw.state is State.SCORED:
                    self.ready[draw.deadline] = self.ready.get(draw.deadline, 0) + 1
        self._count_further()

    def _lost(self, record: Record, now: float) -> None:
        for index, _attempt in record["rows"]:
            draw = self.draws[index]
            self._withdraw(draw, self.step)
            if draw.state is State.COMMITTED:  # its first use stands; there can be no other
                self.reusable.pop(index, None)
                self._release(draw)
                self._let_go(draw)
            else:
                self._end_attempt(draw, "failed:lost", State.WAITING)
        self._count_further()

    def _undo(self, step: int, batch: Batch) -> None:
        """Its optimiser step is no part of history any more; its record stays, to be redone."""
        if batch.trained is not None:
            self._book(batch.trained, -1)
            for entry in batch.accepted(self.per_step):
                draw = self.draws[entry.draw]
                self.reusable.pop(entry.draw, None)
                if draw.steps[0] == step:
                    self._move(draw, State.IN_STEP)
                for lag in entry.oldest:
                    decrease(self.lags, lag)
        for index, rule in batch.filtered.items():
            draw = self.draws[index]
            draw.rule = ""
            if draw.steps[0] == step:
                self.books.add(f"filtered:{rule}", -draw.tokens)
                self._move(draw, State.IN_STEP)
        batch.filtered, batch.trained, batch.version = {}, None, -1

    def _book(self, tokens: tuple[int, int, int], sign: int) -> None:
        for row, many in zip((TRAINED, MASKED, REUSED), tokens, strict=True):
            self.books.add(row, sign * many)

    def _reserve(self, record: Record, step: int) -> None:
        version = self.versions.reserve(record["epoch"], step)
        assert version == record["version"], f"version {record['version']} was reserved, but {version} comes next"
