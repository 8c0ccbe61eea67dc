"""One example per rule of commits, restarts and the end of a run."""

import json

import pytest

from millrace.core.errors import Fenced, LedgerError
from millrace.core.replay.draws import State
from millrace.core.replay.ledger import Ledger
from tests.core.replay.cast import BROKEN, OK
from tests.core.replay.desk import Desk


def trained(desk, steps):
    for step in range(steps):
        desk.make(1)
        desk.take(step)
        desk.train(step)


def test_a_commit_is_a_compare_and_set():
    desk = Desk(steps=9)
    trained(desk, 2)
    with pytest.raises(LedgerError, match="only 2 steps are trained"):
        desk.ledger.commit(step=3, directory="x", digest="d", epoch=desk.learner)
    desk.ledger.commit(step=2, directory="step_2.1", digest="d", epoch=desk.learner)
    assert desk.state.counts[State.COMMITTED] == 2 and not desk.state.draws
    for step, directory in ((2, "other"), (1, "step_1.1")):
        with pytest.raises(LedgerError, match="step 2 is committed already, as step_2.1"):
            desk.ledger.commit(step=step, directory=directory, digest="d", epoch=desk.learner)
    with pytest.raises(LedgerError, match="committed and its groups are gone"):
        desk.take(1)


def test_a_new_learner_redoes_the_recorded_batches():
    desk = Desk(steps=9, max_lag=1)
    trained(desk, 1)
    desk.ledger.commit(step=1, directory="step_1.1", digest="d", epoch=desk.learner)
    desk.make(2)
    first = [entry.lags for entry in desk.ledger.take(step=1, epoch=desk.learner)]
    desk.train(1)
    old = desk.learner
    desk.begin()
    assert (desk.resumption.step, desk.resumption.directory, desk.resumption.version) == (1, "step_1.1", 3)
    with pytest.raises(Fenced, match="a learner of epoch 1 calls, but epoch 2"):
        desk.ledger.commit(step=2, directory="step_2.1", digest="d", epoch=old)
    assert [entry.lags for entry in desk.ledger.take(step=1, epoch=desk.learner)] == first
    table = desk.state.books.table()
    assert table["trained"] == 5 and table["unaccounted"] == 0 and sum(desk.state.lags.values()) == 1


def test_a_dead_branch_counts_the_way_back():
    desk = Desk(steps=9, max_lag=3)
    trained(desk, 3)
    desk.make(1)  # at version 3, step 3
    desk.begin()  # back to step 0
    assert desk.state.versions.lag(3, 4) == 4 + 3
    assert desk.states()[3] is State.WAITING, "as it is it can never be trained in time"
    assert desk.state.books.table()["stale:wait"] and desk.state.draws[3].variation == 0


def test_revert_falls_back_to_an_older_commit():
    desk = Desk(steps=9, keep_commits=2)
    for step in range(2):
        desk.make(1)
        desk.take(step)
        desk.train(step)
        desk.ledger.commit(step=step + 1, directory=f"step_{step + 1}.1", digest="d", epoch=desk.learner)
    with pytest.raises(LedgerError, match=r"those of steps \[1, 2\]"):
        desk.ledger.revert(step=0)
    desk.ledger.revert(step=1)
    desk.begin()
    assert desk.resumption.step == 1 and desk.take(1) == [1]
    desk.train(1)
    desk.ledger.commit(step=2, directory="step_2.2", digest="d", epoch=desk.learner)
    assert desk.state.counts[State.COMMITTED] == 2


def test_the_run_grants_no_draw_it_cannot_use():
    desk = Desk(groups_per_step=2, steps=2, max_lag=3)
    assert len(desk.lease(99)) == 4
    assert "all that the steps to come can use" in desk.ledger.why_idle(0, 1)
    desk.now = 10.0
    desk.ledger.expire()  # what fails is drawn again
    assert [draw for draw, _ in desk.lease(99)] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: d.take(9), "the run has 2 steps"),
        (lambda d: d.train(0), "it was never taken"),
        (lambda d: d.ledger.announce(version=5, epoch=d.learner), "was not reserved for learner epoch 1"),
        (lambda d: d.lease(version=1), "version 1 was never reserved; the newest announced is 0"),
    ],
)
def test_what_the_rules_forbid_is_named(call, message):
    with pytest.raises(LedgerError, match=message):
        call(Desk())


def test_records_rebuild_the_ledger_and_leases_get_a_full_grace():
    desk = Desk(groups_per_step=1, steps=9, group_size=3, max_lag=3)
    trained(desk, 2)
    desk.put(*desk.lease())
    desk.judge(OK, OK, BROKEN)
    desk.ledger.commit(step=1, directory="step_1.1", digest="d", epoch=desk.learner)
    (group,) = desk.lease()
    desk.now = 9.0
    rebuilt = Ledger(desk.ledger.config, clock=lambda: desk.now, emit=desk.records.append)
    rebuilt.replay(json.loads(json.dumps(desk.records)))
    assert rebuilt.state == desk.state
    desk.now = 18.0
    assert not rebuilt.expire() and desk.ledger.expire()
    assert rebuilt.state != desk.state
    desk.now = 19.0
    assert rebuilt.expire() and rebuilt.state.draws[group.draw].state is State.WAITING
