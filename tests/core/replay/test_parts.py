"""The pure parts: versions, leases, limiter, configuration, journal, waste."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.core.errors import ConfigError, LedgerError
from millrace.core.replay import selectors
from millrace.core.replay.config import QueueConfig
from millrace.core.replay.journal import MemoryJournal, Outcome
from millrace.core.replay.leases import Hold, Leases
from millrace.core.replay.limiter import RateLimiter, explain_idle, idle_slots
from millrace.core.replay.selectors import Candidate
from millrace.core.replay.versions import Versions, admissible, forced, overfull, pick

BASE = {"groups_per_step": 2, "group_size": 2, "steps": 4}


@given(lag=st.integers(0, 6), live=st.integers(0, 40), per_step=st.integers(1, 8), max_lag=st.integers(0, 6))
def test_admission_is_the_formula(lag, live, per_step, max_lag):
    count = admissible(lag, live, per_step=per_step, max_lag=max_lag)
    for more in range(1, count + 3):
        fits = lag + -(-(live + more) // per_step) - 1 <= max_lag
        assert fits == (more <= count)


def test_versions_of_several_dead_branches():
    versions = Versions()
    for step in range(6):
        versions.announce(versions.reserve(1, step))  # 0..5
    versions.fork(3)
    for step in (3, 4):
        versions.announce(versions.reserve(2, step))  # 6, 7
    versions.fork(4)
    versions.announce(versions.reserve(3, 4))  # 8
    assert [versions.lag(v, 5) for v in (2, 3, 5, 6, 7, 8)] == [3, 2, 4, 2, 1, 1]
    assert all(versions.lag(v, versions.deadline(v, 2)) == 2 for v in range(9))
    with pytest.raises(LedgerError, match="version 9 was never reserved"):
        versions.lag(9, 5)


DUE = st.dictionaries(st.integers(4, 8), st.integers(1, 4), max_size=4)


@given(due=DUE, data=st.data(), per_step=st.integers(1, 4))
def test_taking_what_is_forced_keeps_every_deadline(due, data, per_step):
    """Against the rule as it is written, by brute force over every batch."""
    step, room = 4, per_step
    ready = {d: data.draw(st.integers(0, n)) for d, n in due.items()}
    musts = forced(due, ready, {}, room=room, last=step, per_step=per_step)
    order = [d for d in sorted(ready, reverse=True) for _ in range(ready[d])]  # the least urgent first

    def keeps(batch):
        left = {d: due[d] - batch.count(d) for d in due}
        return all(sum(left[e] for e in left if e <= d) <= per_step * (d - step) for d in range(step, 10))

    urgent = sorted(order)[:room]
    assert (musts is not None) == keeps(urgent)
    if musts is not None:
        batch = [order[i] for i in pick(list(range(len(order))), order, musts, room)]
        assert len(batch) == min(room, len(order)) and keeps(batch)


def test_overfull_counts_the_places_of_recorded_batches():
    assert overfull({3: 1, 5: 2}, {3: 1, 5: 2}, last=5, per_step=2) is None
    assert overfull({3: 2}, {3: 1}, last=5, per_step=2) == (3, 1)
    assert overfull({6: 3}, {}, last=5, per_step=2) == (6, 1)


@pytest.mark.parametrize("name", selectors.__all__)
@given(rows=st.lists(st.tuples(st.integers(0, 99), st.integers(0, 9), st.integers(0, 5)), unique_by=lambda r: r[0]))
def test_a_selector_is_an_order_that_does_not_depend_on_completion(name, rows):
    candidates = [Candidate(*row) for row in rows]
    order = getattr(selectors, name)(candidates)
    assert sorted(order) == sorted(candidates)
    assert getattr(selectors, name)(candidates[::-1]) == order


def test_leases_lapse_once_and_in_time():
    leases = Leases()
    for draw in range(3):
        leases.grant(Hold(draw, 0, "w", 1, start_s=10 + draw, lease_s=4, cap_s=20), now=0.0)
    leases.renew(leases.held[1], 5, now=1.0)  # its next deadline is earlier than its first
    assert leases.next_deadline() == 5.0
    assert [hold.draw for hold in leases.lapsed(5.0)] == [1]
    leases.end(1)
    assert leases.lapsed(9.9) == [] and [hold.draw for hold in leases.lapsed(12.0)] == [0, 2]
    leases.end(0), leases.end(2)
    assert leases.next_deadline() is None and leases.by_epoch == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_groups": 5}, "min_groups = 5 can never be reached: max_lag = 1 and groups_per_step = 2 admit 4"),
        ({"min_groups": 3, "steps": 1}, "min_groups = 3 is more than the run ever draws"),
        ({"stale": "requeue"}, "needs requeues >= 1"),
        ({"requeues": 2}, "no other rule takes it"),
        ({"selector": "newest"}, "unknown selector 'newest': it is one of deadline, fifo, freshest"),
        ({"selector": "deadline", "max_lag": 0}, "lease order"),
        ({"lease_s": 50, "lease_cap_s": 40, "start_s": 1}, "lease_s = 50 is longer than its cap lease_cap_s = 40"),
        ({"groups_per_step": 0}, "greater than or equal to 1"),
        ({"stall": "wait"}, "did you mean 'stale'"),
    ],
)
def test_what_would_deadlock_is_refused_with_its_numbers(changes, message):
    with pytest.raises(ConfigError) as caught:
        QueueConfig.parse({**BASE, **changes}, source="run.toml")
    assert message in str(caught.value)


def test_every_field_says_what_it_is():
    assert all(field.description for field in QueueConfig.model_fields.values())


def test_a_limiter_that_would_block_both_sides_is_refused():
    with pytest.raises(ValueError, match="min_size = 9 inserts at 2 samples per insert need room for 18"):
        RateLimiter(min_size=9, max_diff=16, samples_per_insert=2.0)
    with pytest.raises(ValueError, match="one insert is 4 samples, but inserts block at 2"):
        RateLimiter(min_size=0, max_diff=2, samples_per_insert=4.0)


@given(slots=st.integers(1, 200), per_step=st.integers(1, 8), size=st.integers(1, 8), max_lag=st.integers(0, 3))
def test_the_advice_on_idle_slots_fills_them(slots, per_step, size, max_lag):
    run = {"groups_per_step": per_step, "group_size": size, "max_lag": max_lag}
    idle, text = idle_slots(slots, **run), explain_idle(slots, **run)
    assert bool(idle) == bool(text)
    if idle:
        lag, groups = map(int, re.search(r"max_lag = (\d+) or groups_per_step = (\d+) would fill", text).groups())
        assert idle_slots(slots, **{**run, "max_lag": lag}) == 0
        assert idle_slots(slots, **{**run, "groups_per_step": groups}) == 0
        assert idle_slots(slots - idle, **run) == 0


def outcome(location):
    return Outcome(location, draw=0, attempt=0, state="committed", steps=(0,), rule="", verdicts=None, lags=())


def test_a_pack_is_freed_with_its_last_row():
    journal = MemoryJournal()
    a, b = journal.store(b"12345678", [1, 3], of=4)
    assert journal.store(b"empty", [], of=0) == []
    journal.forget(outcome(a))
    journal.forget(outcome(a))
    assert journal.load(b) == (b"12345678", 3) and journal.bytes == 8
    journal.forget(outcome(b))
    assert journal.bytes == 0
