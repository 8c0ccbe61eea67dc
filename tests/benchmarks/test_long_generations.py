"""Which tokens count as generated."""

from benchmarks.long_generations import Fate, long_run, share_trained

OLD = Fate(tokens=80, first=1, last=4, trained=True)
LATE = Fate(tokens=40, first=9, last=9, trained=False)


def test_what_the_end_of_the_run_left_over_does_not_count() -> None:
    assert share_trained([OLD, LATE], {"generated": 150, "in_flight": 30, "queued": 40}, before=5) == 1.0


def test_an_old_rollout_that_was_not_trained_counts_against_the_run() -> None:
    wasted = Fate(tokens=20, first=2, last=3, trained=False)
    assert share_trained([OLD, wasted, LATE], {"generated": 140}, before=5) == 0.8


def test_tokens_of_no_stored_rollout_count_against_the_run() -> None:
    waste = {"generated": 150, "failed: crashed": 10, "in_flight": 20}
    assert share_trained([OLD, LATE], waste, before=5) == 80 / 90


def test_late_rollouts_that_were_trained_all_the_same_do_not_help() -> None:
    late = Fate(tokens=40, first=9, last=9, trained=True)
    wasted = Fate(tokens=20, first=2, last=3, trained=False)
    assert share_trained([OLD, wasted, late], {"generated": 140}, before=5) == 0.8


def test_more_responses_are_under_way_than_a_step_trains() -> None:
    table = long_run(steps=80, max_lag=8)
    per_step = table["loop"]["groups_per_step"] * table["loop"]["group_size"]
    assert table["generation"]["slots"] >= 4 * per_step
