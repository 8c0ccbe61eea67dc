"""A whole run that trains each group in two steps, beside one that trains it in one."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from millrace.cluster import jobs
from tests.records import records

STEPS, GROUPS, SIZE = 12, 16, 8


def train(config: Any) -> Any:
    return jobs.train(config, local=True, say=lambda line: None)


@pytest.fixture(scope="module")
def ran(make_run_in: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """The configuration and result of a run with two uses, and the result of the same with one."""
    root = tmp_path_factory.mktemp("reuse")
    again = make_run_in(root, name="again", seed=3, loop={"reuse": 2, "max_lag": 4})
    once = make_run_in(root, name="once", seed=3, loop={"max_lag": 4})
    return again, train(again), train(once)


def batches(directory: Path) -> dict[int, list[int]]:
    """Step -> the draws of its batch, in a run in which nothing was filtered and nothing failed."""
    taken = [record for record in records(directory) if record["op"] == "took"]
    return {record["step"]: [row[0] for row in record["rows"]] for record in taken}


def test_it_makes_every_step_and_learns(ran: Any) -> None:
    _, found, once = ran
    for each in (found, once):
        assert (each["ended"], each["steps"]) == ("finished", STEPS)
        assert each["samples"] == STEPS * GROUPS * SIZE == sum(each["lag_histogram"].values())
        assert each["held_out"]["first"]["mean"] < 0.4
        assert each["held_out"]["last"]["mean"] > 0.9
        assert max(map(int, each["lag_histogram"])) <= 4


def test_no_group_is_used_too_often_or_twice_in_one_batch(ran: Any) -> None:
    config, _, _ = ran
    taken = batches(config.directory)
    assert sorted(taken) == list(range(STEPS))
    assert all(len(set(draws)) == len(draws) == GROUPS for draws in taken.values())
    uses = Counter(draw for draws in taken.values() for draw in draws)
    assert max(uses.values()) == 2
    assert Counter(uses.values())[2] > 0.9 * len(uses)


def test_it_generates_half_as_much_and_its_books_balance(ran: Any) -> None:
    _, found, once = ran
    waste, other = dict(found["waste"]), once["waste"]
    assert 0.45 * other["generated"] < waste["generated"] < 0.62 * other["generated"]
    assert found["draws"]["committed"] < 0.6 * STEPS * GROUPS
    generated, reused = waste.pop("generated"), waste.pop("reused")
    assert waste["unaccounted"] == 0 == other["unaccounted"]
    assert generated == sum(waste.values())
    assert waste["trained"] + reused == pytest.approx(other["trained"], rel=0.15)
    assert "reused" not in other
    rates = found["throughput"]
    assert rates["trained_tokens_per_s"] * found["seconds"] == pytest.approx(waste["trained"] + reused)


def test_lengths_count_a_group_once(ran: Any) -> None:
    _, found, _ = ran
    rows = found["trained_by_length"]
    assert sum(row["generated"] for row in rows) == found["draws"]["committed"] * SIZE
    assert [row["trained"] for row in rows] == [1.0] * len(rows)
