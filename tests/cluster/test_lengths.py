"""The share of trained rollouts by length, by hand."""

import json
from pathlib import Path
from typing import Any

from millrace.cluster.lengths import trained_by_length


def generated(index: int, *lengths: int, attempt: int = 0) -> dict[str, Any]:
    runs = [[[0, 0, length]] for length in lengths]
    return {"op": "generated", "rows": [[index, attempt, sum(lengths), runs, [0, 0]]]}


def took(step: int, *groups: tuple[int, int]) -> dict[str, Any]:
    return {"op": "took", "step": step, "rows": [[*group, [0], [0]] for group in groups]}


def ledger(folder: Path, *records: dict[str, Any]) -> Path:
    path = folder / "ledger.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_long_groups_that_were_never_taken_show_in_the_last_decile(tmp_path: Path) -> None:
    records = [generated(index, index + 1) for index in range(20)]
    path = ledger(tmp_path, *records, took(0, *((index, 0) for index in range(18))))
    rows = trained_by_length(path, steps=1)
    assert sum(row["generated"] for row in rows) == 20
    assert [row["trained"] for row in rows[:-1]] == [1.0] * (len(rows) - 1)
    assert rows[-1] == {"longest": 20, "generated": 2, "trained": 0.0}


def test_filtered_lost_and_untrained_groups_do_not_count_as_trained(tmp_path: Path) -> None:
    path = ledger(
        tmp_path,
        *(generated(index, 5, 5) for index in range(4)),
        took(0, (0, 0), (1, 0), (2, 0)),
        {"op": "filtered", "step": 0, "rows": [[1, 0, "same"]]},
        {"op": "lost", "rows": [[2, 0]]},
        took(1, (3, 0)),
    )
    assert trained_by_length(path, steps=1) == [{"longest": 5, "generated": 8, "trained": 0.25}]


def test_a_further_use_does_not_undo_the_first(tmp_path: Path) -> None:
    path = ledger(
        tmp_path,
        *(generated(index, 5) for index in range(4)),
        took(0, (0, 0), (1, 0), (2, 0)),
        {"op": "committed", "step": 1},
        took(1, (0, 0), (1, 0), (2, 0), (3, 0)),
        {"op": "filtered", "step": 1, "rows": [[1, 0, "same"]]},
        {"op": "lost", "rows": [[2, 0], [3, 0]]},
        took(2, (0, 0)),
    )
    assert trained_by_length(path, steps=2) == [{"longest": 5, "generated": 4, "trained": 0.75}]


def test_a_second_attempt_is_a_rollout_of_its_own(tmp_path: Path) -> None:
    path = ledger(tmp_path, generated(0, 4), generated(0, 4, attempt=1), took(0, (0, 1)))
    assert trained_by_length(path, steps=1) == [{"longest": 4, "generated": 2, "trained": 0.5}]


def test_nothing_generated_is_no_row(tmp_path: Path) -> None:
    assert trained_by_length(ledger(tmp_path), steps=0) == []
