"""Further uses of groups: one example per rule, and what a whole run comes to."""

import json

import pytest

from millrace.core.errors import ConfigError
from millrace.core.protocols import Feedback
from millrace.core.replay import selectors
from millrace.core.replay.config import QueueConfig
from millrace.core.replay.draws import State
from millrace.core.replay.ledger import Ledger
from millrace.core.replay.selectors import Candidate
from millrace.core.types import GroupId
from tests.core.replay.desk import Desk


def desk(**changes):
    return Desk(**{"steps": 9, "max_lag": 3, "reuse": 2, **changes})


def uses(desk, step):
    entries = desk.ledger.take(step=step, epoch=desk.learner)
    return entries and [(entry.draw, desk.ledger.use(entry.draw, step)) for entry in entries]


def commit(desk, step):
    desk.ledger.commit(step=step, directory=f"step_{step}", digest="d", epoch=desk.learner)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reuse": 2, "max_lag": 0}, "at least 1 updates old, and max_lag allows 0. Lower reuse to 1 or raise max_lag"),
        ({"reuse": 4, "max_lag": 2}, "reuse = 4 with max_lag = 2: each use is in another step"),
        ({"reuse": 4, "max_lag": 2}, "Lower reuse to 3 or raise max_lag to 3"),
        ({"reuse": 2, "min_groups": 4, "max_lag": 3}, "max_lag = 3, reuse = 2 and groups_per_step = 2 admit 3 groups"),
        ({"reuse": 2, "min_groups": 5, "max_lag": 7}, "steps = 4 times groups_per_step = 2, each used 2 times"),
        ({"reuse": 0}, "greater than or equal to 1"),
    ],
)
def test_what_cannot_work_is_refused_with_its_numbers(changes, message):
    base = {"groups_per_step": 2, "group_size": 2, "steps": 4}
    with pytest.raises(ConfigError) as caught:
        QueueConfig.parse({**base, **changes}, source="run.toml")
    assert message in str(caught.value)


def test_the_most_groups_that_min_groups_may_ask_for_are_admitted():
    d = desk(groups_per_step=2, max_lag=3, min_groups=3)
    assert len(d.lease(99)) == 3  # 2 * (3 + 1) places less 1, two for each


def test_a_group_is_used_again_when_its_use_is_trained_and_never_beside_itself():
    d = desk(groups_per_step=2)
    d.make(2)
    assert uses(d, 0) == [(0, 0), (1, 0)]
    assert d.take(1) is None, "both stand in step 0, which is not trained"
    d.train(0)
    assert uses(d, 1) == [(0, 1), (1, 1)]
    d.train(1)
    assert d.take(2) is None and not d.state.reusable


@pytest.mark.parametrize("stale", ["wait", "mask", "train", "drop"])
def test_every_rule_leaves_further_uses_that_would_be_too_old(stale):
    d = desk(max_lag=1, stale=stale)
    first = d.make(1)
    assert d.take(0) == [0]
    d.train(0)
    second = d.make(1)  # of version 1
    assert (first, second) == ([(0, 0)], [(1, 0)]) or second == []
    d.state.reusable.pop(0)  # it misses its turn
    second = second or d.make(1)
    assert d.take(1) == [1]
    d.train(1)
    assert uses(d, 2) == [(1, 1)]
    d.train(2)
    assert not d.state.reusable and not d.state.counts[State.STALE]


def test_the_run_draws_a_share_of_its_places():
    for per_step, steps, reuse in [(4, 12, 2), (4, 12, 3), (1, 10, 2), (3, 5, 2), (2, 7, 3)]:
        d = desk(groups_per_step=per_step, steps=steps, max_lag=11, reuse=reuse)
        for step in range(steps):
            d.make(99)
            assert d.take(step) is not None
            d.train(step)
        assert 0 <= d.state.next_draw - -(-steps * per_step // reuse) <= d.ledger.config.stagger, (per_step, steps)
        assert sum(d.state.lags.values()) == per_step * steps
        assert not d.state.reusable and not d.state.further


def test_tokens_are_booked_once_and_further_uses_beside_them():
    d = desk()
    d.make(1)
    for step in range(2):
        d.take(step)
        d.train(step)
    table = d.state.books.table()
    assert table == {
        "generated": 5,
        "trained": 5,
        "masked": 0,
        "in_flight": 0,
        "queued": 0,
        "unaccounted": 0,
        "reused": 5,
    }
    assert d.state.lags == {0: 1, 1: 1}


@pytest.mark.parametrize(("said", "trained", "masked"), [(None, 4, 1), (5, 3, 2), (3, 5, 0)])
def test_masked_tokens_are_those_of_first_uses_as_far_as_the_learner_says(said, trained, masked):
    d = desk(groups_per_step=2, selector="freshest")
    d.make(2)
    d.take(0)
    d.train(0, tokens=10)
    d.make(1)
    assert uses(d, 1) == [(2, 0), (0, 1)]
    feedback = Feedback(trained_tokens=8, masked_tokens=2, reused_tokens=said)
    d.ledger.trained(step=1, epoch=d.learner, feedback=feedback)
    table = d.state.books.table()
    assert (table["trained"] - 10, table["masked"], table["reused"]) == (trained, masked, 5)
    assert table["unaccounted"] == 0


def test_a_filtered_use_is_the_last_and_its_tokens_stay_trained():
    d = desk(reuse=3)
    d.make(1)
    d.take(0)
    d.train(0)
    assert uses(d, 1) == [(0, 1)]
    d.ledger.filtered(step=1, epoch=d.learner, groups={GroupId(0, 0): "easy"})
    assert d.take(1) is None and not d.state.reusable and not d.state.further
    assert d.make(1) == [(1, 0)]
    assert uses(d, 1) == [(1, 0)]
    assert d.state.books.table()["trained"] == 5 and "filtered:easy" not in d.state.books.table()
    assert d.states() == {0: State.TRAINED, 1: State.IN_STEP}


def test_a_first_use_filtered_in_the_redoing_ends_the_recorded_further_one():
    d = desk()
    d.make(1)
    for step in range(2):
        d.take(step)
        d.train(step)
    d.begin()
    assert uses(d, 0) == [(0, 0)]
    d.ledger.filtered(step=0, epoch=d.learner, groups={GroupId(0, 0): "easy"})
    assert d.state.batches[1].entries == []
    d.make(1)
    assert uses(d, 0) == [(1, 0)]
    d.train(0)
    assert uses(d, 1) == [(1, 1)]


def test_further_uses_leave_a_place_for_every_first_one():
    """Group 0 returns when the restarted learner does not filter it: group 2, drawn in its place, is waited for."""
    d = desk(groups_per_step=2, steps=2)
    d.make(2)
    d.take(0)
    d.ledger.filtered(step=0, epoch=d.learner, groups={GroupId(0, 0): "easy"})
    late = d.lease()
    d.begin()
    assert uses(d, 0) == [(0, 0), (1, 0)]
    d.train(0)
    assert list(d.state.reusable) == [0, 1] and d.take(1) is None
    d.put(*late, version=0)
    d.judge()
    assert sorted(uses(d, 1)) == [(0, 1), (2, 0)]


def test_a_batch_taken_ahead_holds_no_use_that_is_too_old_for_it():
    d = desk(max_lag=1, selector="freshest")
    d.make(1)
    d.take(0)
    d.train(0)
    d.state.further = 0  # as if its further use were not counted on
    d.make(1)
    assert d.take(1) == [1] and list(d.state.reusable) == [0]
    assert d.take(2) is None


@pytest.mark.parametrize("name", selectors.__all__)
def test_what_was_used_less_goes_first(name):
    again, first = Candidate(draw=1, deadline=6, lag=0, use=1), Candidate(draw=2, deadline=6, lag=0, use=0)
    assert getattr(selectors, name)([again, first]) == [first, again]


def test_a_restart_redoes_every_use_and_a_payload_lives_as_long_as_one_is_needed():
    d = desk(reuse=3)
    d.make(1)
    for step in range(2):
        d.take(step)
        d.train(step)
        commit(d, 1) if step == 0 else None
    assert uses(d, 2) == [(0, 2)]
    lags = [entry.lags for entry in d.ledger.take(step=2, epoch=d.learner)]
    d.begin()
    assert (d.resumption.step, uses(d, 1)) == (1, [(0, 1)])
    d.train(1)
    assert uses(d, 2) == [(0, 2)] and [e.lags for e in d.ledger.take(step=2, epoch=d.learner)] == lags
    d.train(2)
    assert d.state.books.table()["reused"] == 10 and not d.state.released
    commit(d, 2)
    assert not d.state.released, "its third use is not committed"
    commit(d, 3)
    assert [each.location for each in d.state.released] == [(0, 0)] and not d.state.draws
    rebuilt = Ledger(d.ledger.config, clock=lambda: d.now, emit=d.records.append)
    rebuilt.replay(json.loads(json.dumps(d.records)))
    assert rebuilt.state == d.state


def test_a_revert_takes_back_the_uses_of_later_steps_only():
    d = desk(keep_commits=2)
    d.make(1)
    for step in range(2):
        d.take(step)
        d.train(step)
        commit(d, step + 1)
    d.ledger.revert(step=1)
    assert d.state.counts[State.COMMITTED] == 1
    d.begin()
    assert uses(d, 1) == [(0, 1)] and d.state.books.table().get("reused", 0) == 0
    d.train(1)
    commit(d, 2)
    assert d.state.books.table()["reused"] == 5 and d.state.counts[State.COMMITTED] == 1


def test_a_committed_group_that_lost_its_payload_stays_committed_and_is_not_used_again():
    d = desk(groups_per_step=2)
    d.make(2)
    d.take(0)
    d.train(0)
    commit(d, 1)
    assert uses(d, 1) == [(0, 1), (1, 1)]
    d.ledger.recover(lambda location: location == (0, 1))
    assert d.state.counts[State.COMMITTED] == 2 and not d.state.waiting
    assert [entry.draw for entry in d.state.batches[1].entries] == [1]
    d.begin()
    d.make(1)
    assert uses(d, 1) == [(1, 1), (2, 0)]


def test_a_filtered_group_that_lost_its_payload_is_not_drawn_again():
    d = Desk(steps=9, keep_commits=2)
    d.make(1)
    d.take(0)
    d.ledger.filtered(step=0, epoch=d.learner, groups={GroupId(0, 0): "easy"})
    d.make(1)
    d.take(0)
    d.train(0)
    commit(d, 1)
    d.ledger.recover(lambda location: False)
    assert not d.state.waiting and d.state.books.table()["unaccounted"] == 0


def test_records_of_runs_without_reuse_say_nothing_of_it():
    d = Desk(steps=9)
    d.make(1)
    d.take(0)
    d.train(0)
    trained = next(record for record in d.records if record["op"] == "trained")
    assert sorted(trained) == ["epoch", "masked", "op", "step", "tokens", "version"]
    assert "reused" not in d.state.books.table()


def test_a_payload_lost_after_its_first_use_is_drawn_again_when_that_use_is_redone():
    d = desk(groups_per_step=2, keep_commits=2)
    d.make(2)
    assert uses(d, 0) == [(0, 0), (1, 0)]
    d.train(0)
    commit(d, 1)
    d.ledger.recover(lambda location: location != (0, 0))
    d.begin()
    assert d.states()[0] is State.COMMITTED, "its use stands"
    d.ledger.revert(step=0)  # the checkpoint is damaged, too
    d.begin()
    assert (d.states()[0], d.states()[1]) == (State.WAITING, State.IN_STEP)
    assert uses(d, 0) is None
    d.make(1)
    assert uses(d, 0) == [(1, 0), (0, 0)]
    assert all(d.state.draws[draw].location for draw in (0, 1))
    table = d.state.books.table()
    assert (table["failed:lost"], table["unaccounted"]) == (5, 0)
