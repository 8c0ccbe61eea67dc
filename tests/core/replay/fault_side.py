"""What fails in the small world besides its learner: engines, judges, and the queue's own process."""

from contextlib import suppress

from millrace.core.protocols import Role
from millrace.core.replay.draws import State
from millrace.core.types import GroupId
from tests.core.replay.cast import Engine, Hand
from tests.core.replay.disk_model import POINTS, STORE_POINTS, QueueDied
from tests.core.replay.learner_side import LearnerSide
from tests.core.replay.witness import Witness

# Calls that the queue's death may interrupt; whoever made it repeats it.
_INTERRUPTED = ("lease", "put", "judge", "score", "take", "train", "commit", "announce", "filter", "work", "late")
_INTERRUPTED += ("fail", "fence", "judge_fence")


class FaultSide(LearnerSide):
    """Faults of engines, judges and the queue, and what must follow of each."""

    witness: Witness

    def _fault_actions(self, ordinary: list[tuple]) -> list[tuple]:
        budget, out = self.budget, []
        for i, engine in enumerate(self.engines):
            if budget.fence and engine.hands:
                out.append(("fence", i))
            if budget.fail:
                out += [("fail", i, h) for h in range(len(engine.hands))]
        for name, (_, hands) in self.judges.items():
            if budget.judge_fence and hands:
                out.append(("judge_fence", name))
        if budget.queue_crash:
            calls = [action for action in (*ordinary, *out) if action[0] in _INTERRUPTED]
            out += [("queue_crash", point, *action) for action in calls for point in POINTS]
            out += [("queue_crash", point, *action) for action in calls if action[0] == "put" for point in STORE_POINTS]
        return out

    def check(self) -> None:
        super().check()
        state, fates, variations = self.ledger.state, self.witness.fates, self.witness.variations
        assert len(state.quarantined) == state.counts[State.DEAD], "a dead draw is not told of"
        for draw in state.draws.values():
            own = draw.crashes, draw.judge_crashes, draw.failures
            assert own == fates.get(draw.index, (0, 0, 0)), f"draw {draw.index} has failed {own}"
            assert draw.variation == variations.get(draw.index, 0), f"draw {draw.index} samples {draw.variation}"
            worn = max(own[:2]) >= self.config.crashes or own[2] >= self.config.attempts
            assert not worn, f"draw {draw.index} has failed {own} and is still {draw.state}"
        for leases, number in ((state.leases, 0), (state.judgings, 1)):
            for epoch in leases.by_epoch:
                held = [hold.draw for hold in leases.of(epoch) if fates.get(hold.draw, (0, 0))[number] > 1]
                assert len(held) <= 1, f"epoch {epoch} holds the suspects {held} together"

    # -- engines and judges

    def _do_fence(self, i: int) -> None:
        self.budget.fence -= 1
        engine = self.engines[i]
        state = self.ledger.state
        held = {hold.draw: state.draws[hold.draw].crashes for hold in state.leases.of(engine.epoch)}
        for _ in range(2):
            self.ledger.fence(engine.name, cause="crashed", traceback="killed")
        self._gone(engine.name, engine.epoch)
        for index, crashes in held.items():
            if (draw := state.draws.get(index)) is not None:
                assert draw.state is State.WAITING, f"draw {index} of a dead engine is {draw.state}"
                assert draw.crashes == crashes + 1, f"draw {index} counts {draw.crashes} crashes after {crashes}"
        self._enter(engine)

    def _do_judge_fence(self, name: str) -> None:
        self.budget.judge_fence -= 1
        epoch, _ = self.judges[name]
        draws, held = self.ledger.state.draws, self.ledger.state.judgings.of(epoch)
        before = {hold.draw: draws[hold.draw].judge_crashes for hold in held}
        self.ledger.fence(name, cause="hung")
        self._gone(name, epoch)
        for index, crashes in before.items():
            if (draw := draws.get(index)) is not None:
                assert draw.judge_crashes == crashes + 1, f"draw {index} counts {draw.judge_crashes} dead judges"
        self.judges[name] = (self.ledger.join(name, role=Role.REWARD, slots=4), [])

    def _gone(self, name: str, epoch: int) -> None:
        state = self.ledger.state
        assert name not in state.workers, f"{name} is gone and still there"
        assert not state.leases.of(epoch) and not state.judgings.of(epoch), f"epoch {epoch} has ended and holds leases"

    def _do_fail(self, i: int, h: int) -> None:
        """The engine raised on one group, and goes on."""
        self.budget.fail -= 1
        engine = self.engines[i]
        hand = engine.hands.pop(h)
        state, index = self.ledger.state, hand.id.draw
        before = state.draws[index].failures if state.leases.holder(*hand.id, engine.epoch) else None
        for request in ("f", "g"):
            self.ledger.fail_groups(engine.name, epoch=engine.epoch, failures={hand.id: "Traceback"})
            assert request
        assert not state.leases.holder(*hand.id, engine.epoch), f"{hand.id} failed and is still leased"
        if before is not None and (draw := state.draws.get(index)) is not None:
            assert draw.failures == before + 1, f"{hand.id} failed once and counts {draw.failures - before}"
        engine.old, engine.failed[hand.id] = [*engine.old, hand][-2:], len(hand.runs)

    # -- the queue

    def _stored(self, hand: Hand, engine: Engine) -> bool:
        """This put has been accepted before, and the group is here."""
        draw = self.ledger.state.draws.get(hand.id.draw)
        if draw is None or hand.epoch != engine.epoch:
            return False
        return (draw.attempt, draw.epoch) == (hand.id.attempt, hand.epoch) and draw.location is not None

    def _do_queue_crash(self, point: str, name: str, *args: object) -> bool:
        """The queue's process dies within a call and comes back from its disk; the caller repeats the call.

        What this world held before is left as it is: `after` gives it a world that shares everything with another.
        """
        self.budget = self.budget.copy()
        self.budget.queue_crash -= 1
        twin = self.copy()
        twin.disk.trap = point
        with suppress(QueueDied):
            getattr(twin, f"_do_{name}")(*args)
            return False
        survives = twin if point in ("answer", "torn") else self
        known, expected = self.disk.records, survives.ledger.state
        self.__dict__.update(self.copy_of_callers().__dict__)
        self.witness = survives.witness.copy()
        self.witness.disk = twin.disk
        self._restart_queue(known)
        if point != "torn":
            assert self.ledger.state == expected, f"the ledger came back different from {name} interrupted at {point}"
        return getattr(self, f"_do_{name}")(*args) is not False or point in ("answer", "torn")

    def _restart_queue(self, known: tuple[str, ...]) -> None:
        """As ReplayQueue begins: the records, then the payloads they need.

        Args:
            known: the first of the records, from which this queue may be restarted many times.
        """
        disk, ledger = self.disk, self.new_ledger()
        disk.restart(ledger, known)
        self.ledger = ledger
        for engine in self.engines:  # every lease has one full grace
            for hand in engine.hands:
                hand.seen_at = hand.granted_at = self.now
        lost = {
            GroupId(draw.index, draw.attempt)
            for draw in ledger.state.draws.values()
            if draw.location is not None and draw.location not in disk.payloads
        }
        ledger.recover(lambda location: location in disk.payloads)
        disk.flush()
        for draw in ledger.state.draws.values():
            if draw.state in (State.GENERATED, State.JUDGING, State.SCORED, State.IN_STEP):
                assert draw.location in disk.payloads, f"draw {draw.index} has a torn payload and goes on"
        if len(ledger.state.versions.steps) > len(self.paths) + self._unanswered():
            self._groups_lost(lost)

    def _unanswered(self) -> int:
        """Versions that were reserved in the call that died."""
        return sum(batch.version >= len(self.paths) for batch in self.ledger.state.batches.values())
