"""The benchmarks' arithmetic: pairs, intervals, rows."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import harness

KEYS = {
    "id",
    "what",
    "value",
    "interval",
    "target",
    "reached",
    "commit",
    "machine",
    "date",
    "command",
    "details",
}


def test_arms_alternate_and_the_warm_up_is_not_measured() -> None:
    order: list[str] = []

    def arm(name: str) -> Callable[[], float]:
        def run() -> float:
            order.append(name)
            return float(len(order))

        return run

    found = harness.interleave({"a": arm("a"), "b": arm("b")}, pairs=2, warm=1, say=lambda line: None)
    assert order == ["a", "b"] * 3
    assert found == {"a": [3.0, 5.0], "b": [4.0, 6.0]}


def test_the_ratio_is_of_pairs_and_its_interval_holds_the_median() -> None:
    found = harness.ratio([1.0, 30.0, 2.0, 3.0, 2.2], [1.0, 10.0, 1.0, 3.0, 1.0])
    assert found.median == pytest.approx(2.0)  # of 1, 3, 2, 1, 2.2; the ratio of the medians would be 2.2
    assert 1.0 <= found.low < found.median < found.high <= 3.0


def test_measurements_that_are_no_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="2 and 1 measurements are no pairs"):
        harness.ratio([1.0, 2.0], [1.0])


@pytest.mark.parametrize(
    ("value", "target", "reached"),
    [(0.9, (">=", 0.9), True), (0.89, (">=", 0.9), False), (8.1, ("<=", 8.0), False), (1.0, None, None)],
)
def test_a_target_is_reached_or_not(value: float, target: harness.Target | None, reached: bool | None) -> None:
    row = harness.row("x", "what", value, target=target, where="here", details={})
    assert row.reached is reached
    assert row.interval is None


def test_rows_are_kept_with_all_keys_the_last_of_each_id(tmp_path: Path) -> None:
    path = tmp_path / "results" / "script.json"
    said: list[str] = []
    found = harness.Ratio(median=0.8, low=0.7, high=0.85)
    for id, value in (("first", 1.0), ("second", found), ("first", found)):
        row = harness.row(id, "ours / theirs", value, target=(">=", 0.9), where="here", details={"limit": 1})
        harness.record([row], path, say=said.append)
    rows = json.loads(path.read_text())
    assert [row["id"] for row in rows] == ["first", "second"]
    assert all(set(row) == KEYS for row in rows)
    assert rows[0]["interval"] == [0.7, 0.85]
    assert "reached" in said[0] and "MISSED" in said[1]


def test_a_busy_machine_is_refused_unless_one_insists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (99.0, 0.0, 0.0))
    with pytest.raises(SystemExit, match=r"load 99\.0 .* --busy"):
        harness.refuse_a_busy_machine(anyway=False)
    harness.refuse_a_busy_machine(anyway=True)


def test_recorded_rows_have_these_keys_too() -> None:
    rows = [row for file in harness.RESULTS.glob("*.json") for row in json.loads(file.read_text())]
    assert rows and all(set(row) == KEYS for row in rows)
