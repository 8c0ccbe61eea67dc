"""Rows are readable while the run goes on, and TensorBoard sees the same numbers."""

import json
from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from millrace.cluster.record import Recorder


def test_a_row_is_on_disk_before_the_run_ends_and_in_tensorboard_after(tmp_path: Path) -> None:
    with Recorder(tmp_path) as record:
        record.metrics(3, {"reward/mean": np.float32(0.5), "waits": {"learner": "data"}, "gap": float("inf")})
        row = json.loads((tmp_path / "metrics.jsonl").read_text())
        assert (row["step"], row["reward/mean"], row["waits"], row["gap"]) == (3, 0.5, {"learner": "data"}, None)
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in board.Scalars("reward/mean")] == [(3, 0.5)]
    assert board.Tags()["scalars"] == ["reward/mean"]


def test_events_of_a_resumed_run_are_appended(tmp_path: Path) -> None:
    for _ in range(2):
        with Recorder(tmp_path) as record:
            record.event("joined", worker="generation-0")
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert kinds == ["joined", "joined"]
