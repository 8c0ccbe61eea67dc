"""Where the time of a publish went, and what counts as a pause of fetching."""

import pytest

from benchmarks.publish import PIECES, fetch_pause_s, pieces
from benchmarks.publish_actors import first_of

STEPS = [(0.0, 1.0, 0), (1.1, 2.0, 0), (2.1, 3.0, 0), (3.4, 4.0, 0), (9.0, 10.0, 1), (10.1, 11.0, 1)]


def test_the_pieces_add_up_to_the_whole() -> None:
    learner = {"began": 10.0, "written": 11.75, "published": 99.0}
    engine = {"heard": 12.0, "swap_began": 12.25, "swap_ended": 14.0, "serves": 14.5}
    found = pieces(learner, engine)
    assert tuple(found) == PIECES
    assert sum(found.values()) == engine["serves"] - learner["began"]
    assert found["pause_and_load"] == 1.75


def test_a_pause_is_what_exceeds_the_gaps_just_before() -> None:
    assert fetch_pause_s(STEPS, [(3.1, 4.0)]) == [pytest.approx(0.3 - 0.1)]
    assert fetch_pause_s(STEPS, [(2.0, 3.0)]) == [pytest.approx(0.0)]


def test_a_step_that_never_began_again_is_a_pause_up_to_the_swap() -> None:
    assert fetch_pause_s(STEPS, [(3.5, 5.0)]) == [pytest.approx(1.0 - 0.4)]


def test_the_first_step_of_a_version_is_the_first_that_ended_with_it() -> None:
    assert first_of(STEPS, 1) == 10.0
    assert first_of(STEPS, 0) == 1.0
