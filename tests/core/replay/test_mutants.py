"""Planted bugs: each breaks one rule of the production ledger, and the explorer, a walk or the books must find it."""

from types import SimpleNamespace

import pytest

from millrace.core.protocols import Resumption
from millrace.core.replay import draw_rules, judge_rules, step_rules
from millrace.core.replay.draw_rules import DrawRules
from millrace.core.replay.draws import Batch, Commit, State, Worker
from millrace.core.replay.judge_rules import JudgeRules
from millrace.core.replay.leases import Leases
from millrace.core.replay.state import LedgerState
from millrace.core.replay.step_rules import StepRules
from millrace.core.replay.transaction import Transaction
from millrace.core.replay.versions import Versions
from millrace.core.replay.waste import QUEUED
from tests.core.replay.planted import hunt, into

MUTANTS = {}
mutant = into(MUTANTS)


# -- leases (loop.md section 2)


@mutant("wedged engine")
def heartbeat_without_progress_renews(patch):
    patch.setattr(DrawRules, "_news", lambda self, group, tokens, epoch: True)

    def renew(self, hold, progress, now):
        hold.progress = progress
        hold.deadline = min(now + hold.lease_s, hold.granted_at + hold.cap_s)

    patch.setattr(Leases, "renew", renew)


@mutant("wedged engine")
def progress_renews_beyond_the_cap(patch):
    def renew(self, hold, progress, now):
        if progress > hold.progress:
            hold.progress, hold.deadline = progress, now + hold.lease_s

    patch.setattr(Leases, "renew", renew)


@mutant("engine faults")
def late_put_of_an_ended_lease_is_accepted(patch):
    patch.setattr(Leases, "holder", lambda self, draw, attempt, epoch: self.held.get(draw))


@mutant("engine faults")
def an_ended_epoch_may_call(patch):
    def current(self, worker, epoch, role):
        return self.state.workers[worker]

    patch.setattr(Transaction, "current", current)


@mutant("engine faults")
def rejoining_does_not_fence(patch):
    patch.setattr(DrawRules, "_lose", lambda self, epoch, cause, tokens=None: None)


@mutant("engine faults")
def repeated_put_is_counted_twice(patch):
    honest = DrawRules.put_groups

    def put_groups(self, worker, *, epoch, headers, store):
        receipts = honest(self, worker, epoch=epoch, headers=headers, store=store)
        for header, receipt in zip(headers, receipts, strict=True):
            if "stored already" in receipt.reason:
                self.state.books.meters[epoch].known += header.tokens
                self.state.books.add(QUEUED, header.tokens)
        return receipts

    patch.setattr(DrawRules, "put_groups", put_groups)


@mutant("plain")
def repeated_lease_request_grants_again(patch):
    patch.setattr(Worker, "remember", lambda self, request, ids: None)


@mutant("engine faults")
def an_attempt_is_repeated_under_its_old_number(patch):
    honest = Transaction.do

    def do(self, op, **fields):
        if op == "leased":
            fields["rows"] = [[index, 0] for index, _ in fields["rows"]]
        honest(self, op, **fields)

    patch.setattr(Transaction, "do", do)


@mutant("judges")
def lost_judge_regenerates_the_group(patch):
    honest = Transaction.give_back

    def give_back(self, draws, why):
        if why == "expired":
            self.fail([(draw, draw.tokens) for draw in draws], "expired")
        else:
            honest(self, draws, why)

    patch.setattr(Transaction, "give_back", give_back)


@mutant("judges")
def failed_judge_scores_zero(patch):
    honest = judge_rules.plain
    patch.setattr(judge_rules, "plain", lambda verdict: [*honest(verdict)[:1], verdict.score or 0.0, {}, ""])


@mutant("judges")
def one_valid_verdict_is_enough(patch):
    patch.setattr(JudgeRules, "_valid", lambda self, verdict: 2)


# -- the run's end, filters, the books


@mutant("plain")
def draws_beyond_the_last_step(patch):
    patch.setattr(DrawRules, "_needed", lambda self, alive: 100)


@mutant("synchronous")
def filtered_places_are_never_refilled(patch):
    patch.setattr(DrawRules, "_needed", lambda self, alive: 4 - self.state.next_draw)


@mutant("synchronous")
def filtered_tokens_are_not_booked(patch):
    def filtered(self, record, now):
        for index, _, rule in record["rows"]:
            self.batches[record["step"]].filtered[index] = rule
            self._move(self.draws[index], State.FILTERED)

    patch.setattr(LedgerState, "_filtered", filtered)


@mutant("wedged engine")
def tokens_after_the_fence_are_not_booked(patch):
    patch.setattr(LedgerState, "_book_late", lambda self, meter, index, attempt, tokens: None)


@mutant("leaving")
def abandoned_tokens_are_not_booked(patch):
    honest = LedgerState._end_attempt

    def end_attempt(self, draw, row, state):
        honest(self, draw, "dropped" if row == "failed:abandoned" else row, state)
        self.books.rows.pop("dropped", None)

    patch.setattr(LedgerState, "_end_attempt", end_attempt)


# -- versions and staleness (section 3)


@mutant("synchronous, restarts")
def admission_is_off_by_one(patch):
    honest = draw_rules.admissible
    patch.setattr(draw_rules, "admissible", lambda *args, **kwargs: honest(*args, **kwargs) + 1)


@mutant("wait, lag 1")
def admission_forgets_the_lag(patch):
    honest = draw_rules.admissible
    patch.setattr(draw_rules, "admissible", lambda lag, live, **kwargs: honest(0, live, **kwargs))


@mutant("wait, lag 2")
def batch_does_not_wait_for_the_oldest(patch):
    patch.setattr(step_rules, "forced", lambda *args, **kwargs: [])
    patch.setattr(StepRules, "_evict_overfull", lambda self: None)


@mutant("wait, lag 1")
def forced_groups_are_not_picked(patch):
    patch.setattr(step_rules, "pick", lambda order, deadlines, musts, room: order[:room])
    patch.setattr(StepRules, "_evict_overfull", lambda self: None)


@mutant("drop, lag 1")
def old_groups_are_not_dropped(patch):
    patch.setattr(StepRules, "_evict_old", lambda self, step: None)


@mutant("synchronous")
def completion_order_at_lag_0(patch):
    patch.setattr(StepRules, "_in_lease_order", lambda self, room: list(self.state.scored)[:room])


@mutant("restart")
def dead_branch_has_the_lag_of_the_trunk(patch):
    patch.setattr(Versions, "lag", lambda self, version, step: step - self.steps[version])


@mutant("restart")
def nothing_is_given_up_after_a_fork(patch):
    patch.setattr(StepRules, "_evict_overfull", lambda self: None)


@mutant("restart")
def version_is_used_again(patch):
    honest = StepRules.join_learner

    def join_learner(self):
        resumption = honest(self)
        return Resumption(epoch=resumption.epoch, step=resumption.step, version=resumption.step)

    patch.setattr(StepRules, "join_learner", join_learner)


# -- take, trained, commit


@mutant("wait, lag 2")
def take_is_not_idempotent(patch):
    calls = SimpleNamespace(count=0)

    def accepted(self, per_step):
        calls.count += 1
        entries = [entry for entry in self.entries if entry.draw not in self.filtered][:per_step]
        return entries[::-1] if calls.count % 2 else entries

    patch.setattr(Batch, "accepted", accepted)


@mutant("restart")
def restart_forms_new_batches(patch):
    honest = LedgerState._rejoined

    def rejoined(self, record, now):
        honest(self, record, now)
        for step in [k for k in self.batches if k >= self.step]:
            for entry in self.batches.pop(step).entries:
                self._move(self.draws[entry.draw], State.SCORED)

    patch.setattr(LedgerState, "_rejoined", rejoined)


@mutant("restart")
def restart_keeps_uncommitted_steps(patch):
    patch.setattr(LedgerState, "_undo", lambda self, batch: None)


@mutant("restart")
def replaced_learner_may_go_on(patch):
    patch.setattr(Transaction, "learner", lambda self, epoch: None)


@mutant("plain")
def commit_moves_the_pointer_alone(patch):
    def committed(self, record, now):
        self.commits = [Commit(record["step"], record["directory"], record["digest"], record["epoch"])]

    patch.setattr(LedgerState, "_committed", committed)


@mutant("plain")
def commit_moves_a_batch_that_is_not_trained(patch):
    def committed(self, record, now):
        self.commits = [Commit(record["step"], record["directory"], record["digest"], record["epoch"])]
        for batch in self.batches.values():
            for entry in batch.entries:
                if self.draws[entry.draw].state is not State.COMMITTED:
                    self._move(self.draws[entry.draw], State.COMMITTED)

    patch.setattr(LedgerState, "_committed", committed)


@mutant("plain")
def repeated_trained_makes_another_step(patch):
    def trained(self, *, step, epoch, feedback):
        version = len(self.state.versions.steps)
        self.do("trained", step=step, epoch=epoch, version=version, tokens=feedback.trained_tokens, masked=0)
        return version

    patch.setattr(StepRules, "trained", trained)


@pytest.mark.parametrize("name", MUTANTS)
def test_the_planted_bug_is_found(name, monkeypatch):
    plant, scene = MUTANTS[name]
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        hunt(scene)
