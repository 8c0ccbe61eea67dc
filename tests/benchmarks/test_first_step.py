"""What the start of a run is measured by."""

import json
import os
from pathlib import Path

from benchmarks import first_step


def test_the_first_step_is_made_when_its_weights_are_there(tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    assert first_step.made(tmp_path) is None
    weights.mkdir()
    (weights / "version_0.json").touch()
    (weights / "version_1.bin").touch()
    assert first_step.made(tmp_path) is None
    (weights / "version_1.json").touch()
    os.utime(weights / "version_1.json", (90.0, 100.0))
    assert first_step.made(tmp_path) == 100.0


def test_milestones_are_seconds_from_the_start_in_their_order(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    for path, at_s in ((tmp_path / "config.toml", 103.0), (tmp_path / "weights" / "version_0.json", 109.5)):
        path.touch()
        os.utime(path, (at_s, at_s))
    events = [{"kind": "started", "time_s": 105.0}, {"kind": "started", "time_s": 200.0}]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    assert list(first_step.milestones(tmp_path, 100.0).items()) == [
        ("checked", 3.0),
        ("started", 5.0),
        ("learner published", 9.5),
    ]
