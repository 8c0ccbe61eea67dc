"""What must hold in the small world after every action, by what the world itself remembers."""

from collections import Counter, defaultdict
from operator import attrgetter
from typing import Any

from millrace.core.replay.config import QueueConfig
from millrace.core.replay.draws import LIVE, OPEN, State
from millrace.core.replay.ledger import Ledger
from millrace.core.types import GroupId
from tests.core.replay.cast import Budget, Engine

_COUNTED = (*LIVE, State.WAITING, State.TRAINED)
_DRAW = (
    "index",
    "state",
    "attempt",
    "failures",
    "crashes",
    "requeues",
    "epoch",
    "min_version",
    "deadline",
    "variation",
)
_DRAW += ("judge_crashes", "judge_failures", "judge_expiries", "shunned", "rule")
_of_draw, _of_budget = attrgetter(*_DRAW), attrgetter(*Budget.__slots__)


class Oracle:
    """The invariants of the ledger, and an independent account of lag."""

    config: QueueConfig
    ledger: Ledger
    budget: Budget
    engines: list[Engine]
    judges: dict[str, tuple[int, list[GroupId]]]
    history: list[list[GroupId]]  # the surviving batches
    sizes: dict[GroupId, int]
    rejects: set[tuple[GroupId, int]]
    lost: set[GroupId]
    path: list[int]  # the surviving history as nodes of a tree
    paths: list[tuple[int, ...]]  # version -> its path from the start
    true_counters: dict[int, int]  # worker epoch -> tokens its engine really sampled
    committed: int
    returned: int
    forked: bool
    frugal: bool
    now: float
    epoch: int
    pending: Any
    taken: Any

    def lag(self, version: int, step: int) -> int:
        """The distance in the tree of all histories between two weights."""
        there, here = self.paths[version], self.path[: step + 1]
        common = 0
        while common < min(len(there), len(here)) and there[common] == here[common]:
            common += 1
        return (len(there) - common) + (step + 1 - common)

    def use(self, group: GroupId) -> int:
        """How often the surviving history has trained it."""
        return sum(group in batch for batch in self.history)

    def _check_fresh(self, step: int, entries: list, open_before: set[int]) -> None:
        for entry in entries:
            runs = [run for own in self.ledger.state.draws[entry.draw].runs for run in own]
            lags = [self.lag(run[0], step) for run in runs]
            assert lags == entry.lags, f"draw {entry.draw}: lags {entry.lags}, really {lags}"
            if self.config.stale in ("wait", "drop") or self.ledger.use(entry.draw, step):
                assert max(lags) <= self.config.max_lag, f"draw {entry.draw} has lag {max(lags)} in step {step}"
        if self.config.max_lag == 0 and len(entries) == self.config.groups_per_step:
            order = [entry.draw for entry in entries]
            assert order == sorted(open_before)[: len(order)], (
                f"{order} is not the lease order of {sorted(open_before)}"
            )

    def check(self) -> None:
        state, config = self.ledger.state, self.config
        self._check_draws()
        assert self.ledger._available(state.step) == len(self.ledger._candidates(state.step))
        self._check_history()
        size = config.groups_per_step
        assert sum(state.lags.values()) == size * config.group_size * state.step
        placed = sum(len(batch.entries) - len(batch.filtered) for k, batch in state.batches.items() if k >= state.step)
        places = size * (config.steps - state.step) + self.returned
        assert state.open + placed <= places, "more draws than the run can use"
        if self.frugal:
            assert state.next_draw <= -(-size * config.steps // config.reuse), "fewer draws would do"
        self._check_uses()
        if config.stale == "wait":
            assert not state.counts[State.STALE], "the rule `wait` lost a draw"
            forked = self.forked or "stale:wait" not in state.books.rows
            assert forked, "the rule `wait` gave a group up though history never forked"
        self._check_books()

    def _check_draws(self) -> None:
        """Every count, queue and lease says what the draws say."""
        state, due, ready = self.ledger.state, {}, {}
        found: defaultdict[State, list[int]] = defaultdict(list)
        for index, draw in state.draws.items():
            found[draw.state].append(index)
            if draw.state in OPEN:
                due[draw.deadline] = due.get(draw.deadline, 0) + 1
                if draw.state is State.SCORED:
                    ready[draw.deadline] = ready.get(draw.deadline, 0) + 1
        for name in _COUNTED:
            many = len(found[name])
            assert many == state.counts[name], f"{many} draws are {name}, {state.counts[name]} counted"
        assert sum(state.counts.values()) == state.next_draw, "a draw is in no state, or in two"
        assert min(state.counts.values()) >= 0
        assert sorted(state.waiting) == sorted(found[State.WAITING])
        assert state.generated.keys() == set(found[State.GENERATED])
        assert state.scored.keys() == set(found[State.SCORED])
        assert state.leases.held.keys() == set(found[State.LEASED])
        assert state.judgings.held.keys() == set(found[State.JUDGING])
        assert state.due == due and state.ready == ready

    def _check_history(self) -> None:
        """Every use once, each in a batch of its own, and the pointer moves with the draws."""
        state, config = self.ledger.state, self.config
        trained = Counter(group.draw for batch in self.history for group in batch)
        assert all(len(set(batch)) == len(batch) == config.groups_per_step for batch in self.history), self.history
        assert max(trained.values(), default=0) <= config.reuse, f"a draw is trained too often in {self.history}"
        assert state.step == len(self.history)
        assert state.commits[-1].step == self.committed
        committed = {group.draw for batch in self.history[: self.committed] for group in batch}
        assert state.counts[State.COMMITTED] == len(committed), "the commit moved more or less than its draws"
        assert state.counts[State.TRAINED] == len(trained) - len(committed)

    def _check_uses(self) -> None:
        """What a retained checkpoint or a further use needs is there, and nothing else."""
        state, config = self.ledger.state, self.config
        recorded = {}
        for step, batch in state.batches.items():
            for entry in batch.entries:
                recorded.setdefault(entry.draw, []).append(step)
        for step, batch in state.batches.items():
            assert all(max(recorded[i]) == step for i in batch.filtered), f"one of {batch.filtered} is used again"
        needed = {*recorded, *state.reusable}
        for index, draw in state.draws.items():
            if draw.state not in OPEN and draw.state is not State.WAITING:
                assert index in needed, f"{draw} is kept for nothing"
            kept = [step for step in draw.steps if step in state.batches]
            assert kept == sorted(recorded.get(index, [])), f"{draw} stands in {recorded.get(index)}"
        gone = {group for group, _ in self.rejects}
        further = 0
        for index in needed:
            draw, last = state.draws[index], max(recorded.get(index, [-1]))
            if index in state.reusable or last >= self.committed:
                assert draw.location is not None, f"{draw} has no payload"
                assert (index, draw.attempt) not in self.lost, f"{draw} has lost its payload"
            if index in state.reusable:
                assert last < state.step and self.use(GroupId(index, draw.attempt)), f"{draw} has a use to come"
                assert draw.deadline >= state.step and len(draw.steps) < config.reuse, f"{draw} can have no use"
                assert self.forgetful or (index, draw.attempt) not in gone, f"{draw} was filtered"
            elif last < state.step or index in state.batches[last].filtered:
                continue
            left = min(draw.deadline, config.steps - 1) - max(state.step - 1, last)
            further += max(0, min(config.reuse - len(draw.steps), left))
        assert state.further == further, f"{state.further} further uses are counted, not {further}"

    def _check_books(self) -> None:
        books = self.ledger.state.books
        table = books.table()
        uses = Counter(group for batch in self.history for group in batch)
        assert table["trained"] + table["masked"] == sum(self.sizes[group] for group in uses), table
        assert table.get("reused", 0) == sum(self.sizes[group] * (many - 1) for group, many in uses.items()), table
        assert table["unaccounted"] == 0, table
        assert min(table.values()) >= 0, table
        for epoch, meter in books.meters.items():
            true = self.true_counters.get(epoch, 0)
            assert max(meter.known, meter.counter) <= true, f"{meter} of an engine that sampled {true} tokens"

    def key(self) -> tuple:
        """What the future depends on; equal keys need only be explored once."""
        state = self.ledger.state
        draws = tuple(
            (*_of_draw(d), str(d.runs), tuple(d.steps), max(0.0, d.shun_until - self.now)) for d in state.draws.values()
        )
        holds = tuple(
            (h.draw, h.epoch, h.progress, h.deadline - self.now, h.granted_at - self.now)
            for leases in (state.leases, state.judgings)
            for h in leases.held.values()
        )
        batches = tuple(
            (
                step,
                tuple((e.draw, e.attempt, *e.lags, *e.oldest) for e in b.entries),
                tuple(b.filtered.items()),
                b.trained is None,
            )
            for step, b in state.batches.items()
        )
        engines = tuple(
            (e.epoch, e.version, tuple((h.id, h.epoch, tuple(h.runs), h.known, h.seen_at - self.now) for h in e.hands))
            for e in self.engines
        )
        gone = tuple((h.id, h.epoch) for e in self.engines for h in e.old)
        judges = tuple((epoch, tuple(hands)) for epoch, hands in self.judges.values())
        taken = self.taken and tuple(self.taken)
        learner = (self.epoch, self.pending, taken, state.step, self.committed, tuple(self.paths))
        queues = (tuple(state.generated), tuple(state.scored), tuple(sorted(state.waiting)), state.next_draw)
        learner = (*learner, tuple(sorted(self.rejects)), tuple(state.reusable), tuple(c.step for c in state.commits))
        learner = (*learner, state.counts[State.DEAD])
        faults = _of_budget(self.budget)
        return draws, holds, batches, engines, gone, judges, learner, queues, faults, state.versions.newest
