"""A small world around the production ledger: engines, judges and a learner that crash, repeat and come late."""

from collections import Counter
from copy import copy
from math import ceil
from typing import Self

from millrace.core.errors import Fenced
from millrace.core.protocols import Role
from millrace.core.replay.config import QueueConfig
from millrace.core.replay.draws import OPEN, State
from millrace.core.replay.ledger import Ledger
from millrace.core.types import GroupId, GroupVerdict, Verdict
from tests.core.replay.cast import BROKEN, OK, Budget, Engine, Hand
from tests.core.replay.copies import containers, copied
from tests.core.replay.disk_model import Disk, DurableLedger
from tests.core.replay.fault_side import FaultSide
from tests.core.replay.witness import Witness


class World(FaultSide):
    def __init__(
        self,
        config: QueueConfig,
        *,
        engines: int = 1,
        judges: int = 1,
        budget: Budget,
        tick_s: float = 6.0,
        record: bool = False,
        forgetful: bool = False,  # the restarted learner's filter does not know what the earlier one threw out
        frugal: bool = False,  # nothing ages and nothing fails: no use may be left over
    ):
        self.config, self.budget, self.tick_s = config, budget, tick_s
        self.witness = Witness(config, disk=Disk() if budget.queue_crash else None, record=record)
        self.kept = [0]
        self.ledger = self.new_ledger()
        self.engines = [Engine(f"generation-{i}") for i in range(engines)]
        self.judges = {f"reward-{i}": (0, []) for i in range(judges)}
        self.true_counters: dict[int, int] = {}  # worker epoch -> tokens its engine really sampled
        self.epoch = self.ids = 0
        self.taken: list[GroupId] | None = None
        self.pending: int | None = None  # version to announce
        self.history: list[list[GroupId]] = []  # surviving: the batch of each step
        self.recorded: dict[int, list[GroupId]] = {}
        self.path: list[int] = []  # surviving history as nodes of a tree
        self.node = 0
        self.paths: list[tuple[int, ...]] = []  # version -> its path from the start
        self.accepted: set[GroupId] = set()
        self.committed = 0
        self.forked = False
        self.rejects: set[tuple[GroupId, int]] = set()  # the uses that the filter throws out; the same after a restart
        self.lost: set[GroupId] = set()  # their payloads did not survive
        self.sizes: dict[GroupId, int] = {}  # tokens of each accepted group
        self.returned = 0  # groups that a filter threw out and a restart may bring back
        self.forgetful, self.frugal = forgetful, frugal
        for engine in self.engines:
            self._enter(engine)
        for name in self.judges:
            self.judges[name] = (self.ledger.join(name, role=Role.REWARD, slots=4), [])
        self._learner_joins()

    def new_ledger(self) -> Ledger:
        """As a new process of the queue has it, in its first state."""
        witness = self.witness
        ledger = (DurableLedger if witness.disk else Ledger)(self.config, clock=witness.clock, emit=witness.emit)
        ledger.disk = witness.disk
        return ledger

    def copy(self) -> Self:
        """It goes its own way from here on. Shared are the configuration and what is only ever replaced as a whole."""
        new = self.copy_of_callers()
        new.witness = witness = self.witness.copy()
        new.ledger = ledger = object.__new__(type(self.ledger))
        ledger.config, ledger.state, ledger.disk = self.config, copied(self.ledger.state), witness.disk
        ledger.clock, ledger.emit = witness.clock, witness.emit
        return new

    def copy_of_callers(self) -> Self:
        """All but the queue."""
        new = object.__new__(type(self))
        new.__dict__.update(containers(self.__dict__))
        new.budget = self.budget.copy()
        new.engines = [engine.copy() for engine in self.engines]
        for name, (epoch, hands) in self.judges.items():
            new.judges[name] = epoch, hands.copy()
        return new

    @property
    def disk(self) -> Disk | None:
        return self.witness.disk

    @property
    def now(self) -> float:
        return self.witness.now

    @now.setter
    def now(self, time: float) -> None:
        self.witness.now = time

    # -- what can be done

    def actions(self) -> list[tuple]:
        state, budget, out = self.ledger.state, self.budget, []
        for i, engine in enumerate(self.engines):
            if engine.version < state.versions.newest:
                out.append(("load", i))
            if self.ledger.room(engine.version) > 0:
                out.append(("lease", i))
                if any(state.draws[index].suspect for index in state.waiting):
                    out += [("lease", i, 2), ("lease", i, 3)]
            out += [("put", i, h) for h in range(len(engine.hands))]
            if engine.hands and budget.work:
                out.append(("work", i))
            if engine.hands and budget.beat:
                out.append(("beat", i))
            if budget.crash and (engine.hands or engine.old):
                out.append(("crash", i))
            if budget.late and engine.old:
                out.append(("late", i))
            if budget.leave and engine.hands:
                out.append(("leave", i))
        for name, (_, hands) in self.judges.items():
            if state.generated:
                out.append(("judge", name))
            out += [("score", name, h) for h in range(len(hands))]
            if budget.judge_fail:
                some = {1, max(1, self.config.group_size - 1)}
                out += [("judge_fail", name, h, broken) for h in range(len(hands)) for broken in sorted(some)]
            if budget.judge_crash and hands:
                out.append(("judge_crash", name))
        if state.leases.held or state.judgings.held:
            out += [("tick",)] if budget.tick else []
        out += self._learner_actions()
        return out + self._fault_actions(out)

    def do(self, action: tuple) -> bool:
        """Make one action, then check everything. False: it had no effect."""
        effect = getattr(self, f"_do_{action[0]}")(*action[1:])
        self.ledger.state.released.clear()
        self.check()
        return effect is not False

    def after(self, action: tuple, *, last: bool) -> Self | None:
        """The world that an action leads to, with everything checked. None: it has no effect.

        Args:
            last: this world is needed no more, and may be the one that goes on.
        """
        if last:
            world = self
        else:
            world = copy(self) if action[0] == "queue_crash" else self.copy()  # that copies what it needs by itself
        return world if world.do(action) else None

    def done(self) -> bool:
        return self.ledger.finished and self.committed == self.config.steps

    # -- engines

    def _enter(self, engine: Engine) -> None:
        engine.old = [*engine.old, *engine.hands][-2:]
        engine.hands, engine.version, engine.failed = [], -1, {}
        engine.epoch = self.ledger.join(engine.name, role=Role.GENERATION, slots=8, generated=engine.counter)
        self.true_counters[engine.epoch] = 0

    def _sample(self, engine: Engine, hand: Hand) -> None:
        hand.runs.append(engine.version)
        engine.counter += 1
        self.true_counters[hand.epoch] += 1

    def _do_load(self, i: int) -> None:
        self.engines[i].version = self.ledger.state.versions.newest

    def _do_lease(self, i: int, want: int = 1) -> bool:
        engine = self.engines[i]
        state = self.ledger.state
        lag = self.lag(engine.version, state.step)
        due = state.step + self.config.max_lag - lag
        places = Counter(
            k for k, b in state.batches.items() if k >= state.step for e in b.entries if e.draw not in b.filtered
        )
        ahead = sum(min(self.config.groups_per_step, places[step]) for step in places if step <= due)
        live = ahead + sum(draw.state in OPEN for draw in state.draws.values())
        self.ids += 1
        call = {"epoch": engine.epoch, "version": engine.version, "want": want, "request": f"r{self.ids}"}
        repeated = call["request"] in state.workers[engine.name].answers  # answered by a queue that then died
        next_draw = state.next_draw
        groups = self.ledger.lease_draws(engine.name, **call)
        if any(group.draw >= next_draw for group in groups) and not repeated:
            places = len(groups) + len(state.waiting)
            assert places <= want, f"{groups} were granted while {state.waiting} wait"
        again = self.ledger.lease_draws(engine.name, **call)
        assert groups == again, f"a repeated request got {again} after {groups}"
        for ahead, group in enumerate(groups, live):
            bound = lag + ceil((ahead + 1) / self.config.groups_per_step) - 1
            assert repeated or bound <= self.config.max_lag, f"{group} was admitted at {bound} > max_lag"
            hand = Hand(group, engine.epoch, [], self.now, self.now)
            self._sample(engine, hand)
            engine.hands.append(hand)
        return bool(groups)

    def _do_work(self, i: int, tokens: int = 1) -> None:
        """A token for each group, then a heartbeat."""
        self.budget.work -= 1
        engine = self.engines[i]
        for hand in engine.hands:
            for _ in range(tokens):
                self._sample(engine, hand)
        self.beat(engine)

    def _do_beat(self, i: int) -> None:
        """A wedged engine: its worker lives and reports, but there are no new tokens."""
        self.budget.beat -= 1
        self.beat(self.engines[i])

    def beat(self, engine: Engine) -> None:
        progress = {hand.id: len(hand.runs) for hand in engine.hands} | engine.failed
        self.ledger.expire()
        lost = self.ledger.heartbeat(engine.name, epoch=engine.epoch, progress=progress, generated=engine.counter)
        for hand in engine.hands:
            if len(hand.runs) > hand.known:
                hand.seen_at, hand.known = self.now, len(hand.runs)
        engine.old += [hand for hand in engine.hands if hand.id in lost]
        engine.old = engine.old[-2:]
        engine.hands = [hand for hand in engine.hands if hand.id not in lost]

    def _put(self, engine: Engine, hand: Hand, epoch: int) -> list:
        self.ledger.expire()
        return self.ledger.put_groups(
            engine.name,
            epoch=epoch,
            headers=[hand.header(self.config.group_size)],
            store=lambda _: self.disk.store([hand.id]) if self.disk else [hand.id],
        )

    def _do_put(self, i: int, h: int) -> None:
        engine = self.engines[i]
        hand = engine.hands.pop(h)
        self._sample(engine, hand)
        self.ledger.expire()
        hold = self.ledger.state.leases.held.get(hand.id.draw)
        held = hold is not None and (hold.draw, hold.attempt) == hand.id and hand.epoch == engine.epoch
        stored = self._stored(hand, engine)
        (receipt,) = self._put(engine, hand, engine.epoch)
        lease = "goes on" if held else "has ended"
        assert receipt.accepted == (held or stored), f"{receipt} although its lease {lease}, stored: {stored}"
        if receipt.accepted:
            assert hand.id not in self.accepted, f"{hand.id} accepted twice"
            self.accepted.add(hand.id)
            self.sizes[hand.id] = len(hand.runs)
        engine.old = [*engine.old, hand][-2:]

    def _do_late(self, i: int) -> None:
        """A group that was put already, or whose worker has been fenced, comes again."""
        self.budget.late -= 1
        engine = self.engines[i]
        hand = engine.old.pop()
        stored, inserts = self._stored(hand, engine), self.ledger.state.counts[State.GENERATED]
        (receipt,) = self._put(engine, hand, engine.epoch)
        assert receipt.accepted == stored and receipt.reason, f"{hand.id} of epoch {hand.epoch}: {receipt}"
        assert self.ledger.state.counts[State.GENERATED] <= inserts, f"{hand.id} was accepted late"
        if hand.epoch != engine.epoch:
            try:
                self._put(engine, hand, hand.epoch)
            except Fenced:
                return
            raise AssertionError("an ended epoch may still put")

    def _do_crash(self, i: int) -> None:
        self.budget.crash -= 1
        ended = self.engines[i].epoch
        self._enter(self.engines[i])
        assert not self.ledger.state.leases.of(ended), f"epoch {ended} has ended and still holds leases"

    def _do_leave(self, i: int) -> None:
        self.budget.leave -= 1
        engine = self.engines[i]
        abandoned = {hand.id: len(hand.runs) for hand in engine.hands} | engine.failed
        call = {"epoch": engine.epoch, "generated": engine.counter, "abandoned": abandoned}
        self.ledger.leave(engine.name, **call)
        self.ledger.leave(engine.name, **call)
        self._enter(engine)

    def _do_tick(self) -> None:
        self.budget.tick -= 1
        self.now += self.tick_s
        before = {
            draw.index: (draw.attempt, draw.judge_expiries)
            for draw in self.ledger.state.draws.values()
            if draw.state is State.JUDGING
        }
        self.ledger.expire()
        for index, (attempt, expiries) in before.items():
            draw = self.ledger.state.draws[index]
            kept = draw.state in (State.JUDGING, State.GENERATED) and draw.attempt == attempt
            assert kept or expiries >= self.config.judge_expiries, f"draw {index} is generated again for its judge"
        for hold in self.ledger.state.leases.held.values():
            hand = next((h for e in self.engines for h in e.hands if h.id == (hold.draw, hold.attempt)), None)
            if hand is not None:
                quiet = self.now - hand.seen_at
                assert quiet < self.config.lease_s, f"{hand.id} made no progress for {quiet} s and is still leased"
                assert self.now - hand.granted_at < self.config.lease_cap_s, f"{hand.id} outlived the cap"

    # -- judges

    def _do_judge(self, name: str, want: int = 1) -> bool:
        epoch, hands = self.judges[name]
        self.ids += 1
        groups = self.ledger.lease_groups(name, epoch=epoch, want=want, request=f"j{self.ids}")
        hands.extend(groups)
        return bool(groups)

    def _verdict(self, name: str, h: int, members: tuple[Verdict, ...]) -> None:
        epoch, hands = self.judges[name]
        group = hands.pop(h)
        draw = self.ledger.state.draws.get(group.draw)
        verdict = GroupVerdict(id=group, verdicts=members)
        (receipt,) = self.ledger.put_verdicts(name, epoch=epoch, verdicts=[verdict])
        if receipt.accepted and draw is not None and draw.state is State.SCORED:
            assert [one[1] for one in draw.verdicts] == [one.score for one in members], "a failed judge became a score"
            valid = sum(one.score is not None for one in members)
            assert valid >= min(2, self.config.group_size), f"{group} is scored with {valid} valid verdicts"
        (again,) = self.ledger.put_verdicts(name, epoch=epoch, verdicts=[verdict])
        assert not again.accepted, f"the verdicts of {group} were accepted twice"

    def _do_score(self, name: str, h: int) -> None:
        self._verdict(name, h, (OK,) * self.config.group_size)

    def _do_judge_fail(self, name: str, h: int, broken: int) -> None:
        self.budget.judge_fail -= 1
        self._verdict(name, h, (OK,) * (self.config.group_size - broken) + (BROKEN,) * broken)

    def _do_judge_crash(self, name: str) -> None:
        self.budget.judge_crash -= 1
        self.judges[name] = (self.ledger.join(name, role=Role.REWARD, slots=4), [])
