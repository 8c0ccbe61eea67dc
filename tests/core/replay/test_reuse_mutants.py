"""Planted bugs of further uses of groups: the explorer or a walk must find each."""

from math import inf

import pytest

from millrace.core.replay import step_rules
from millrace.core.replay.draw_rules import DrawRules
from millrace.core.replay.draw_table import DrawTable
from millrace.core.replay.draws import State
from millrace.core.replay.state import LedgerState
from millrace.core.replay.step_rules import StepRules
from tests.core.replay.planted import hunt, into

MUTANTS = {}
mutant = into(MUTANTS)


@mutant("reuse, pairs")
def two_uses_stand_in_one_batch(patch):
    honest = StepRules._choose

    def choose(self, step, room, candidates):
        chosen = honest(self, step, room, candidates)
        again = [index for index in chosen or () if self.state.draws[index].steps]
        return again[:1] * room if again else chosen

    patch.setattr(StepRules, "_choose", choose)


@mutant("reuse, pairs")
def a_group_is_reusable_before_its_use_is_trained(patch):
    honest = LedgerState._took

    def took(self, record, now):
        honest(self, record, now)
        for index, *_ in record["rows"]:
            if len(self.draws[index].steps) < self.reuse:
                self.reusable[index] = None

    patch.setattr(LedgerState, "_took", took)


@mutant("reuse, mask")
def uses_are_not_bounded(patch):
    patch.setattr(DrawTable, "_possible", lambda self, draw, first: max(0, draw.deadline - first + 1))


@mutant("mask, lag 3, reuse 2")
def further_uses_have_no_deadline(patch):
    def possible(self, draw, first):
        return max(0, min(self.reuse - len(draw.steps), self.steps - first))

    patch.setattr(DrawTable, "_possible", possible)


@mutant("reuse, restarts")
def further_uses_are_booked_as_trained_again(patch):
    def tokens(self, step, batch, feedback):
        return {"tokens": feedback.trained_tokens, "masked": feedback.masked_tokens}

    patch.setattr(StepRules, "_tokens", tokens)


@mutant("reuse, restarts")
def undoing_a_further_use_undoes_the_first(patch):
    honest = LedgerState._undo

    def undo(self, step, batch):
        before = {entry.draw: self.draws[entry.draw].state for entry in batch.entries}
        honest(self, step, batch)
        for index, state in before.items():
            if state is State.COMMITTED:
                self._move(self.draws[index], State.IN_STEP)

    patch.setattr(LedgerState, "_undo", undo)


@mutant("reuse, restarts")
def an_undone_use_may_be_followed_by_another(patch):
    honest = LedgerState._undo

    def undo(self, step, batch):
        reusable = dict(self.reusable)
        honest(self, step, batch)
        self.reusable = reusable

    patch.setattr(LedgerState, "_undo", undo)


@mutant("reuse, forgetful filter")
def a_filtered_group_keeps_its_later_uses(patch):
    honest = DrawTable._withdraw

    def withdraw(self, draw, since):
        if since <= self.step:  # after a loss, not after a filter
            honest(self, draw, since)

    patch.setattr(DrawTable, "_withdraw", withdraw)


@mutant("reuse, mask")
def a_filtered_group_is_used_again(patch):
    honest = LedgerState._filtered

    def filtered(self, record, now):
        honest(self, record, now)
        for index, _, _ in record["rows"]:
            if 1 < len(self.draws[index].steps) < self.reuse:
                self.reusable[index] = None
        self._count_further()

    patch.setattr(LedgerState, "_filtered", filtered)


@mutant("reuse, pairs")
def the_first_commit_takes_the_payload(patch):
    def let_go(self, draw):
        if draw.state is State.COMMITTED:
            self.reusable.pop(draw.index, None)
            self._release(draw)

    patch.setattr(DrawTable, "_let_go", let_go)


@mutant("reuse, pairs")
def payloads_are_never_let_go(patch):
    patch.setattr(DrawTable, "_let_go", lambda self, draw: None)


@mutant("reuse, revert")
def a_revert_takes_back_first_uses_of_earlier_steps(patch):
    def reverted(self, record, now):
        self.commits = [commit for commit in self.commits if commit.step <= record["step"]]
        for draw in self._drawn(k for k in self.batches if k >= record["step"]):
            if draw.state is State.COMMITTED:
                self._move(draw, State.TRAINED)

    patch.setattr(LedgerState, "_reverted", reverted)


@mutant("reuse, lost payloads")
def a_committed_group_without_payload_is_drawn_again(patch):
    def lost(self, record, now):
        for index, _ in record["rows"]:
            self._withdraw(self.draws[index], self.step)
            self.reusable.pop(index, None)
            self._end_attempt(self.draws[index], "failed:lost", State.WAITING)
        self._count_further()

    patch.setattr(LedgerState, "_lost", lost)


@mutant("reuse, lost payloads")
def the_lost_payload_of_a_further_use_is_not_missed(patch):
    patch.setattr(StepRules, "_needs_payload", lambda self, draw, commit: draw.state is not State.COMMITTED)


@mutant("reuse")
def a_lease_reserves_one_place(patch):
    patch.setattr(DrawRules, "_uses", lambda self: self.state.open)


@mutant("drop, lag 2, reuse 2")
def uses_left_count_as_groups_for_the_present_batch(patch):
    patch.setattr(DrawRules, "_short", lambda self: 0)


@mutant("wait, lag 3, reuse 2")
def further_uses_are_forced_instead_of_first_ones(patch):
    honest = step_rules.pick

    def choose(order, deadlines, musts, room):
        return honest(order, [0 if due == inf else due for due in deadlines], musts, room)

    patch.setattr(step_rules, "pick", choose)
    patch.setattr(StepRules, "_evict_overfull", lambda self: None)


@pytest.mark.parametrize("name", MUTANTS)
def test_the_planted_bug_is_found(name, monkeypatch):
    plant, scene = MUTANTS[name]
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        hunt(scene)
