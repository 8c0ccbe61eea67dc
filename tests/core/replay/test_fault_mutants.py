"""Planted bugs in the rules for workers that die, prompts that poison, and a queue that comes back from its disk."""

from itertools import chain

import pytest

from millrace.core.protocols import Resumption
from millrace.core.replay import state as state_module
from millrace.core.replay.draw_rules import DrawRules
from millrace.core.replay.draw_table import DrawTable
from millrace.core.replay.draws import Draw, State, Worker
from millrace.core.replay.judge_rules import JudgeRules
from millrace.core.replay.state import LedgerState
from millrace.core.replay.step_rules import StepRules
from millrace.core.replay.transaction import Transaction
from tests.core.replay.planted import hunt, into

MUTANTS = {}
mutant = into(MUTANTS)


# -- workers that are gone


@mutant("lost workers")
def a_dead_engine_keeps_its_leases(patch):
    patch.setattr(DrawRules, "_lose", lambda self, epoch, cause, tokens=None, *, traceback="": None)


@mutant("lost workers")
def a_dead_worker_stays_in_the_run(patch):
    patch.setattr(LedgerState, "_gone", lambda self, record, now: None)


@mutant("lost workers")
def a_crash_counts_towards_attempts(patch):
    honest = Transaction.fail

    def fail(self, draws, cause, *, counted=True, **more):
        honest(self, draws, cause, counted=counted or cause == "crashed", **more)

    patch.setattr(Transaction, "fail", fail)


@mutant("poison answers")
def a_crash_of_a_judge_is_not_counted(patch):
    honest = Transaction.give_back

    def give_back(self, draws, why, traceback=""):
        honest(self, draws, "left" if why == "crashed" else why, traceback)

    patch.setattr(Transaction, "give_back", give_back)


@mutant("engine faults")
def rejoining_counts_towards_attempts(patch):
    honest = Transaction.fail

    def fail(self, draws, cause, *, counted=True, **more):
        honest(self, draws, cause, counted=counted or cause == "fenced", **more)

    patch.setattr(Transaction, "fail", fail)


# -- engines that fail


@mutant("failing engine")
def a_failed_group_stays_leased(patch):
    patch.setattr(DrawRules, "fail_groups", lambda self, worker, *, epoch, failures: None)


@mutant("failing engine")
def a_repeated_failure_counts_twice(patch):
    honest = DrawRules.fail_groups

    def fail_groups(self, worker, *, epoch, failures):
        honest(self, worker, epoch=epoch, failures=failures)
        for group in failures:
            if (draw := self.state.draws.get(group.draw)) is not None and draw.state is State.WAITING:
                draw.failures += 1

    patch.setattr(DrawRules, "fail_groups", fail_groups)


# -- seeds


@mutant("lost workers")
def a_crash_samples_anew(patch):
    patch.setattr(state_module, "ANEW", state_module.ANEW | {"crashed"})


@mutant("engine faults")
def silence_samples_anew(patch):
    patch.setattr(state_module, "ANEW", state_module.ANEW | {"expired", "fenced"})


@mutant("failing engine")
def a_failure_samples_the_same_again(patch):
    patch.setattr(state_module, "ANEW", state_module.ANEW - {"engine"})


@mutant("restart")
def a_fork_samples_anew(patch):
    patch.setattr(state_module, "ANEW", state_module.ANEW | {"wait"})


@mutant("requeue, lag 1")
def a_requeue_samples_the_same_again(patch):
    patch.setattr(state_module, "ANEW", state_module.ANEW - {"requeue"})


# -- poison


@mutant("suspects of one engine")
def a_poison_prompt_lives_on(patch):
    honest = Transaction._poison
    patch.setattr(
        Transaction, "_poison", lambda self, draw, cause, counted: counted and honest(self, draw, cause, True)
    )


@mutant("poison answers")
def a_poison_answer_lives_on(patch):
    patch.setattr(
        Transaction, "judge_crashed", lambda self, draws, traceback: self.give_back(draws, "crashed", traceback)
    )


@mutant("suspects of one engine")
def suspects_are_leased_together(patch):
    honest = DrawRules._again
    patch.setattr(DrawRules, "_again", lambda self, count, epoch: ([*chain(*honest(self, count, epoch))], []))


@mutant("suspects of judges")
def suspects_are_judged_together(patch):
    patch.setattr(JudgeRules, "_holds_suspect", lambda self, epoch: False)


@mutant("suspects of one engine")
def new_draws_take_the_places_of_suspects(patch):
    honest = DrawRules._again
    patch.setattr(DrawRules, "_again", lambda self, count, epoch: (honest(self, count, epoch)[0], []))


@mutant("suspects of one engine")
def suspects_wait_for_ever(patch):
    def again(self, count, epoch):
        waiting = sorted(self.state.waiting)[:count]
        kept = [index for index in waiting if self.state.draws[index].suspect]
        return [index for index in waiting if index not in kept], kept

    patch.setattr(DrawRules, "_again", again)


@mutant("poison, lag 0")
def the_wrong_draw_leaves_the_waiting_ones(patch):
    honest = DrawTable._unwait
    patch.setattr(DrawTable, "_unwait", lambda self, index: honest(self, self.waiting[0]))


@mutant("dying draws")
def a_dead_draw_is_not_told_of(patch):
    honest = LedgerState._failed

    def failed(self, record, now):
        honest(self, record, now)
        self.quarantined.clear()

    patch.setattr(LedgerState, "_failed", failed)


@mutant("suspects")
def a_finished_group_stays_suspect(patch):
    honest = LedgerState._generated

    def generated(self, record, now):
        before = {row[0]: self.draws[row[0]].crashes for row in record["rows"]}
        honest(self, record, now)
        for index, crashes in before.items():
            self.draws[index].crashes = crashes

    patch.setattr(LedgerState, "_generated", generated)


# -- restarts of the learner


@mutant("restart")
def a_fork_loses_finished_groups(patch):
    honest = StepRules._give_up
    patch.setattr(StepRules, "_give_up", lambda self, draws, rule, state: honest(self, draws, rule, State.STALE))


@mutant("two checkpoints")
def older_checkpoints_are_not_named(patch):
    honest = StepRules.join_learner

    def join_learner(self):
        told = honest(self)
        return Resumption(epoch=told.epoch, step=told.step, version=told.version)

    patch.setattr(StepRules, "join_learner", join_learner)


# -- the queue dies


@mutant("queue dies")
def a_put_whose_answer_was_lost_is_refused(patch):
    patch.setattr(DrawRules, "_stored", lambda self, header: False)


@mutant("failing engine")
def a_put_that_is_not_here_is_called_stored(patch):
    def stored(self, header):
        draw = self.state.draws.get(header.id.draw)
        return draw is not None and (draw.attempt, draw.epoch) == (header.id.attempt, header.lease_epoch)

    patch.setattr(DrawRules, "_stored", stored)


@mutant("queue dies")
def a_lease_whose_answer_was_lost_is_granted_again(patch):
    patch.setattr(Worker, "remember", lambda self, request, ids: None)


@mutant("queue dies")
def a_restart_believes_in_torn_payloads(patch):
    patch.setattr(StepRules, "recover", lambda self, holds: None)


@mutant("queue dies, two engines")
def progress_is_applied_without_a_record(patch):
    honest = DrawRules.heartbeat

    def heartbeat(self, worker, *, epoch, progress, generated):
        for group in progress:
            if self.state.leases.holder(*group, epoch):
                self.state.draws[group.draw].requeues += 1
        return honest(self, worker, epoch=epoch, progress=progress, generated=generated)

    patch.setattr(DrawRules, "heartbeat", heartbeat)


@mutant("queue dies, faults")
def blame_is_forgotten_by_a_restart(patch):
    honest = Transaction.replay

    def replay(self, records):
        honest(self, [{**record, "cause": "fenced"} if record["op"] == "failed" else record for record in records])

    patch.setattr(Transaction, "replay", replay)


@mutant("queue dies")
def a_repeated_step_is_made_twice(patch):
    honest = StepRules.trained

    def trained(self, *, step, epoch, feedback):
        if step < self.state.step:
            self.state.versions.reserve(epoch, step)
            return len(self.state.versions.steps) - 1
        return honest(self, step=step, epoch=epoch, feedback=feedback)

    patch.setattr(StepRules, "trained", trained)


@mutant("queue dies")
def a_record_is_flushed_before_its_payload_is_stored(patch):
    def put_groups(self, worker, *, epoch, headers, store):
        receipts = honest(self, worker, epoch=epoch, headers=headers, store=lambda rows: [tuple(headers[0].id)])
        self.disk.flush()
        store([0])
        return receipts

    honest = DrawRules.put_groups
    patch.setattr(DrawRules, "put_groups", put_groups)


@mutant("suspects")
def blame_is_cleared_by_every_lease(patch):
    honest = Draw.begin

    def begin(self, attempt, epoch, version):
        honest(self, attempt, epoch, version)
        self.crashes = 0

    patch.setattr(Draw, "begin", begin)


@pytest.mark.parametrize("name", MUTANTS)
def test_the_planted_bug_is_found(name, monkeypatch):
    plant, scene = MUTANTS[name]
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        hunt(scene)
