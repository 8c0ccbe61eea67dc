"""The table of benchmarks/README.md."""

import pytest

from benchmarks import table

ROW = {
    "what": "a | b",
    "value": 0.95,
    "interval": None,
    "target": ">= 0.9",
    "reached": True,
    "command": "python -m benchmarks.x",
}


def test_rows_are_ordered_by_their_numbers() -> None:
    ids = ["memory", "P12s", "P10/b", "P2", "P12/a", "P1/64", "P1/16"]
    assert sorted(ids, key=table._natural) == ["P1/16", "P1/64", "P2", "P10/b", "P12/a", "P12s", "memory"]


def test_what_is_missed_is_shown_as_missed() -> None:
    missed = {**ROW, "id": "P9", "reached": False, "interval": [0.1, 0.2]}
    lines = table.table([{**ROW, "id": "P1"}, missed]).splitlines()
    assert lines[2] == "| P1 | a / b | 0.95 | counted | >= 0.9 | `python -m benchmarks.x` |"
    assert lines[3] == "| P9 | a / b | 0.95 | 0.1 - 0.2 | **>= 0.9: missed** | `python -m benchmarks.x` |"


def test_the_readme_shows_the_rows_of_the_results() -> None:
    text = table.README.read_text()
    assert table.laid_into(text, table.table(table.rows())) == text, "run `python -m benchmarks.table`"


def test_a_text_without_the_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="has no <!-- rows"):
        table.laid_into("nothing", "| |")
