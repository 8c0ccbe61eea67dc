"""One example per rule of leases, verdicts, staleness and batches."""

import pytest

from millrace.core.errors import Fenced, LedgerError
from millrace.core.protocols import Role
from millrace.core.replay.draws import State
from millrace.core.types import GroupId, GroupVerdict, Verdict, VerdictKind
from tests.core.replay.cast import BROKEN, OK
from tests.core.replay.desk import Desk


def test_admission_counts_what_is_ahead():
    desk = Desk(groups_per_step=2, max_lag=1, steps=9)
    assert len(desk.lease(99)) == 4  # (max_lag + 1) * B
    desk.put(*(GroupId(draw, 0) for draw in range(3)))
    desk.judge()
    assert desk.take(0) == [0, 1] and not desk.lease()  # a group in a step is still ahead
    desk.train(0)
    assert len(desk.lease(99, version=0)) == 0  # lag 1: 2 places, and draws 2 and 3 are alive
    assert len(desk.lease(99)) == 2


def test_wait_takes_the_oldest_and_waits_for_them():
    desk = Desk(groups_per_step=1, max_lag=1, steps=9)
    first, second = desk.lease(2)
    desk.put(second)
    desk.judge()
    assert desk.take(0) == [1]  # draw 0 still fits in step 1
    desk.train(0)
    desk.make(1)
    assert desk.take(1) is None  # draw 2 is there, but draw 0 would be too old afterwards
    assert "too old" in desk.ledger.why_no_batch(1) and "draw 0, leased to generation-0" in desk.ledger.why_no_batch(1)
    desk.put(first, version=0)
    desk.judge()
    assert desk.take(1) == [0]


@pytest.mark.parametrize(
    ("changes", "taken", "state", "row"),
    [
        ({"stale": "mask"}, [0], State.IN_STEP, None),
        ({"stale": "train"}, [0], State.IN_STEP, None),
        ({"stale": "drop"}, [3], None, "stale:drop"),
        ({"stale": "requeue", "requeues": 1}, [3], State.WAITING, "stale:requeue"),
        ({"stale": "requeue", "requeues": 1, "stale_then": "mask"}, [3], State.WAITING, "stale:requeue"),
    ],
)
def test_the_other_stale_rules_do_not_wait(changes, taken, state, row):
    desk = Desk(groups_per_step=1, max_lag=1, steps=9, **changes)
    late, second = desk.lease(2)
    desk.put(second)
    desk.judge()
    for step in range(2):
        assert desk.take(step) == [step + 1]
        desk.train(step)
        desk.make(1)
    desk.put(late, version=0)
    desk.judge()
    assert desk.take(2) == taken
    assert desk.states().get(0) == state
    assert row is None or desk.state.books.table()[row] == 5
    assert desk.ledger.masks == (changes.get("stale") == "mask" or changes.get("stale_then") == "mask")


def test_requeue_happens_so_often_and_then_the_next_rule():
    desk = Desk(groups_per_step=1, max_lag=1, steps=20, stale="requeue", requeues=1)
    for attempt in range(2):
        late = desk.lease()[0]
        assert late == (0, attempt)
        while desk.state.step + 1 < desk.state.draws[0].deadline + 2:
            desk.make(1)
            step = desk.state.step
            assert 0 not in desk.take(step)
            desk.train(step)
        desk.put(late, version=desk.state.draws[0].min_version)
        desk.judge()
        desk.make(1)
        step = desk.state.step
        assert 0 not in desk.take(step)
        desk.train(step)
    assert desk.state.counts[State.STALE] == 1 and 0 not in desk.state.draws
    assert desk.state.books.rows["stale:requeue"] == desk.state.books.rows["stale:drop"] == 5


def test_lag_0_takes_in_lease_order():
    desk = Desk(groups_per_step=3, max_lag=0)
    a, b, c = desk.lease(3)
    for group in (c, a):
        desk.put(group)
    desk.judge()
    assert desk.take(0) is None
    desk.put(b)
    desk.judge()
    assert desk.take(0) == [0, 1, 2]


def test_filtered_groups_leave_and_are_refilled():
    desk = Desk(groups_per_step=2, max_lag=0)
    desk.make(2)
    assert desk.take(0) == [0, 1]
    desk.ledger.filtered(step=0, epoch=desk.learner, groups={GroupId(0, 0): "zero_variance"})
    assert desk.take(0) is None
    with pytest.raises(LedgerError, match="1 of 2 places in its batch are empty"):
        desk.train(0)
    assert desk.make(3) == [(2, 0)]
    assert desk.take(0) == [1, 2]
    assert desk.state.books.table()["filtered:zero_variance"] == 5
    with pytest.raises(LedgerError, match="draw 9 attempt 0 is not in its batch"):
        desk.ledger.filtered(step=0, epoch=desk.learner, groups={GroupId(9, 0): "x"})


def test_a_batch_may_be_taken_one_step_ahead():
    desk = Desk(groups_per_step=1, max_lag=2, steps=9)
    desk.make(3)
    assert desk.take(0) == [0] and desk.take(1) == [1]
    with pytest.raises(LedgerError, match="one may be taken ahead"):
        desk.take(2)
    desk.train(0)
    assert desk.take(1) == [1] and desk.take(2) == [2]


def test_min_groups_holds_back_the_first_batch_only():
    desk = Desk(groups_per_step=1, max_lag=2, steps=9, min_groups=3)
    desk.make(2)
    assert desk.take(0) is None
    desk.make(1)
    assert desk.take(0) == [0]
    desk.train(0)
    assert desk.take(1) == [1]


def test_a_draw_that_fails_too_often_is_dead_and_replaced():
    desk = Desk(attempts=2, max_lag=0, steps=1)
    assert desk.lease() == [(0, 0)]
    desk.now = 10.0
    assert desk.ledger.expire() and desk.lease() == [(0, 1)]
    desk.now = 20.0
    assert desk.ledger.expire() and desk.lease() == [(1, 0)]
    assert desk.state.counts[State.DEAD] == 1


def test_leaving_in_order_is_no_failure():
    desk = Desk(attempts=1)
    (group,) = desk.lease()
    desk.ledger.leave("generation-0", epoch=desk.engine, generated=4, abandoned={group: 4})
    assert desk.states() == {0: State.WAITING}
    table = desk.state.books.table()
    assert (table["failed:abandoned"], table["generated"], table["unaccounted"]) == (4, 4, 0)
    with pytest.raises(Fenced, match="left or never joined"):
        desk.lease()


def test_the_counter_is_read_from_the_joining_on():
    desk = Desk()
    epoch = desk.ledger.join("generation-1", role=Role.GENERATION, slots=4, generated=1000)
    desk.ledger.heartbeat("generation-1", epoch=epoch, progress={}, generated=1007)
    table = desk.state.books.table()
    assert (table["generated"], table["unaccounted"]) == (7, 7)  # tokens of no group: evaluation, or a fault


def test_a_failed_judge_is_retried_elsewhere_and_then_masked():
    desk = Desk(group_size=3, judge_retries=1, max_lag=0)
    desk.put(*desk.lease())
    assert desk.judge(OK, OK, BROKEN) == [(0, 0)]
    assert desk.states() == {0: State.GENERATED}
    assert desk.judge(name="reward-0") == []  # elsewhere
    assert desk.judge(OK, OK, BROKEN, name="reward-1") == [(0, 0)]
    assert desk.states() == {0: State.SCORED}
    kinds = [verdict.kind for verdict in desk.ledger.verdicts_of(0).verdicts]
    assert kinds == [VerdictKind.SCORED, VerdictKind.SCORED, VerdictKind.JUDGE_FAILED]


def test_elsewhere_is_not_waited_for_for_ever():
    desk = Desk(group_size=3, judge_retries=1, max_lag=0)
    desk.put(*desk.lease())
    desk.judge(OK, OK, BROKEN)
    desk.now = 9.0
    assert desk.judge() == []
    desk.now = 10.0  # the length of a reward worker's lease
    assert desk.judge() == [(0, 0)]


@pytest.mark.parametrize(("size", "broken", "cause"), [(3, 2, "judge"), (1, 1, "judge"), (2, 1, "judge")])
def test_too_few_valid_verdicts_fail_the_group(size, broken, cause):
    desk = Desk(group_size=size, judge_retries=0)
    desk.put(*desk.lease())
    desk.judge(*(OK,) * (size - broken), *(BROKEN,) * broken)
    assert desk.states() == {0: State.WAITING}
    assert desk.state.books.table()[f"failed:{cause}"] == 5


@pytest.mark.parametrize(
    ("verdict", "why"),
    [
        (Verdict(kind=VerdictKind.SCORED, score=float("nan")), "rollout 0 has score nan"),
        (Verdict(kind=VerdictKind.SCORED, score=0.0, components={"a": float("inf")}), "component 'a' = inf"),
    ],
)
def test_what_is_no_finite_number_is_refused(verdict, why):
    desk = Desk(judge_retries=0)
    desk.put(*desk.lease())
    (group,) = desk.ledger.lease_groups("reward-0", epoch=desk.judges["reward-0"], want=1, request="x")
    sheet = [GroupVerdict(id=group, verdicts=(verdict,))]
    (receipt,) = desk.ledger.put_verdicts("reward-0", epoch=desk.judges["reward-0"], verdicts=sheet)
    assert not receipt.accepted and why in receipt.reason


def test_a_lost_judge_costs_no_tokens_until_it_is_lost_too_often():
    desk = Desk(judge_expiries=1)
    desk.put(*desk.lease())
    for lost in range(2):
        desk.ledger.lease_groups("reward-0", epoch=desk.judges["reward-0"], want=1, request=f"lost {lost}")
        desk.now += 10.0
        desk.ledger.expire()
        assert desk.states() == {0: (State.GENERATED, State.WAITING)[lost]}
    assert desk.state.books.table()["failed:judge_expired"] == 5


def test_only_progress_renews_and_the_cap_ends():
    desk = Desk(lease_cap_s=25)
    (group,) = desk.lease()
    beat = {"epoch": desk.engine, "generated": 9}
    for now, tokens, held in [(9, 1, True), (18, 2, True), (24, 3, True), (25, 4, False)]:
        desk.now = float(now)
        desk.ledger.expire()
        lost = desk.ledger.heartbeat("generation-0", progress={group: tokens}, **beat)
        assert (lost == []) == held, now
    assert desk.state.books.table()["failed:capped"] == 4

    desk = Desk()
    (group,) = desk.lease()
    for now in (5, 9):
        desk.now = float(now)
        desk.ledger.heartbeat("generation-0", progress={group: 0}, **beat)
    desk.now = 10.0
    assert desk.ledger.expire()


def test_a_worker_is_told_of_a_lost_lease_that_had_no_progress():
    desk = Desk()
    (group,) = desk.lease()
    desk.now = 10.0
    desk.ledger.expire()
    call = {"epoch": desk.engine, "progress": {}, "generated": 0}
    assert desk.ledger.heartbeat("generation-0", **call) == [group]
    assert desk.ledger.heartbeat("generation-0", **call) == []


def test_a_worker_holds_its_own_role():
    desk = Desk()
    with pytest.raises(LedgerError, match="joined as reward and calls as generation"):
        desk.ledger.lease_draws("reward-0", epoch=desk.judges["reward-0"], version=0, want=1, request="x")
    with pytest.raises(LedgerError, match="join_learner"):
        desk.ledger.join("learner", role=Role.LEARNER, slots=1)
