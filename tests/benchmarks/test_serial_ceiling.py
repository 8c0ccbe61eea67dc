"""The ceiling is that of two parts one after the other, and the faster form of each part counts."""

from pathlib import Path

import pytest

from benchmarks import serial_ceiling
from millrace.cluster import config

FOUND = {
    "vllm": [90.0, 110.0, 100.0],
    "generate/1": [200.0, 200.0, 200.0],
    "generate at once/1": [300.0, 300.0, 300.0],
    "generate/2": [250.0, 250.0, 250.0],
    "generate with transformers/1": [600.0, 600.0, 600.0],
    "train/1": [150.0, 150.0, 150.0],
    "train/2": [140.0, 140.0, 140.0],
}
SEEN = {"vllm": {"tokens_per_sample": 6.0, "skipped_groups_share": 0.5}, "parts": {"tokens_per_sample": 6.0}}


def rows(found: dict[str, list[float]]) -> dict[str, object]:
    made = serial_ceiling.rows(found, SEEN, ["vllm"], where="", cores=2, steps=60)
    return {row.id: row for row in made}


def test_one_after_the_other_is_slower_than_either() -> None:
    assert serial_ceiling.ceiling([200.0, 100.0], [200.0, 300.0]) == pytest.approx([100.0, 75.0])


def test_the_faster_form_of_each_part_makes_the_ceiling() -> None:
    assert serial_ceiling.faster(FOUND, "generate") == "generate at once/1"
    assert serial_ceiling.faster(FOUND, "train") == "train/1"
    row = rows(FOUND)["P12s/vllm"]
    assert row.details["serial_ceiling"] == pytest.approx(100.0)  # type: ignore[attr-defined]  # a row
    assert row.details["two_core_limit"] == 150.0  # type: ignore[attr-defined]
    assert row.value == pytest.approx(1.0)  # type: ignore[attr-defined]
    assert row.reached is True  # type: ignore[attr-defined]
    # Had the raw step skipped half, too: 1 / (1 / 300 + 0.5 / 150) = 150, of which the run reaches 100.
    assert row.details["if_the_raw_step_skipped_as_many_groups"].startswith("0.667")  # type: ignore[attr-defined]


def test_other_engines_and_trl_have_rows_of_their_own() -> None:
    own = rows(FOUND)["P12s/vllm-raw-transformers"]
    assert own.value == pytest.approx(100 / 120)  # type: ignore[attr-defined]
    assert set(rows(FOUND)) == {"P12s/vllm", "P12s/vllm-raw-transformers"}
    beside = rows({**FOUND, "trl": [50.0, 50.0, 50.0]})
    assert beside["P12s/vllm-trl"].value == pytest.approx(2.0)  # type: ignore[attr-defined]
    assert beside["P12s/vllm-trl"].target == ""  # type: ignore[attr-defined]


def test_the_policy_of_the_run_hardly_moves_and_nothing_is_evaluated(tmp_path: Path) -> None:
    table = serial_ceiling.table("transformers", tmp_path, steps=9)
    made = config.of(table, root=tmp_path, source="test")
    assert made.data.held_out is None
    assert made.learner.learning_rate <= 1e-6
    assert made.loop.groups_per_step * made.loop.group_size == serial_ceiling.SLOTS
