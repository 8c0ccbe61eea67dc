"""status.json: the fields that others rely on, and one moment at a time."""

import errno
import json
from dataclasses import fields
from pathlib import Path

import pytest

from millrace.cluster import snapshot
from millrace.cluster.snapshot import ComponentNow, ComponentState, Snapshot, Status, lost

FIELDS = {
    *("schema", "id", "name", "pid", "host", "state", "error", "time_s", "started_s", "step", "steps"),
    *("committed_step", "version", "reward", "held_out", "lag", "draws", "tokens", "rates", "learner", "waits"),
    *("components", "incidents", "incident", "idle", "quarantined", "eta_s", "note"),
}


def test_its_fields_are_a_contract(tmp_path: Path) -> None:
    assert snapshot.read(tmp_path) is None
    kept = Snapshot(tmp_path, name="a", steps=7)
    kept.update(step=3, reward=0.5, held_out={"step": 2, "mean": None})
    told = json.loads((tmp_path / "status.json").read_text())
    assert set(told) == FIELDS == {each.name for each in fields(Status)}
    assert (told["schema"], told["id"], told["state"], told["step"], told["steps"]) == (
        1,
        str(tmp_path),
        "starting",
        3,
        7,
    )
    assert set(told["rates"]) == {"generated_tokens_per_s", "trained_tokens_per_s", "samples_per_s"}
    assert set(told["learner"]) == {"phase", "phase_s", "wait_share"}
    assert set(told["lag"]) == {"mean", "max"}
    assert snapshot.read(tmp_path) == kept.status
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_a_later_moment_replaces_an_earlier_one_and_keeps_when_it_started(tmp_path: Path) -> None:
    kept = Snapshot(tmp_path)
    first, last = kept.update(step=1), kept.update(state="finished")
    assert (last.step, last.state, last.ended, first.ended) == (1, "finished", True, False)
    assert first.started_s == last.started_s
    assert first.time_s <= last.time_s


def test_what_is_no_number_is_null(tmp_path: Path) -> None:
    Snapshot(tmp_path).update(reward=float("nan"), held_out={"step": 1, "mean": float("inf")})
    told = json.loads((tmp_path / "status.json").read_text(), parse_constant=lambda word: 1 / 0)
    assert (told["reward"], told["held_out"]) == (None, {"step": 1, "mean": None})


def test_keys_of_a_later_release_are_left_out() -> None:
    moment = Status(id="x", state="running")
    assert Status.from_json(json.dumps({**json.loads(moment.to_json()), "mood": "good"})) == moment


def component(state: ComponentState = "serving", restarts: int = 0) -> ComponentNow:
    return {"state": state, "pid": 4, "node": "a", "restarts": restarts, "since_s": 1.0}


def test_what_is_down_is_told_from_what_only_starts(tmp_path: Path) -> None:
    parts = {
        "queue": component(),
        "learner": component("starting"),
        "held-out": component("left", 1),
        "generation-0": component("restarting", 2),
        "generation-1": component("starting", 1),
        "reward-0": component("suspect"),
        "reward-1": component("given up", 4),
    }
    status = Snapshot(tmp_path).update(components=parts, incidents=8, incident="x was lost", idle={"data": 0.5})
    assert list(status.down) == ["generation-0", "generation-1", "reward-0", "reward-1"]
    assert status.restarts == 8
    assert snapshot.read(tmp_path) == status


def test_a_lost_run_says_what_to_do() -> None:
    status = lost(Status(id="runs/x", state="running", step=7, steps=9, committed_step=5, eta_s=3.0))
    assert (status.state, status.step, status.eta_s) == ("failed", 7, None)
    assert status.error is not None
    assert status.error["kind"] == "DriverLost"
    for part in ("at step 7 of 9", "up to step 5", "--resume runs/x"):
        assert part in status.error["message"]


def test_on_a_full_disk_the_moment_is_written_where_the_one_before_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> int:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    moments = Snapshot(tmp_path, step=3)
    moments.update()
    monkeypatch.setattr(Path, "write_bytes", full)
    moments.update(state="failed", step=4, error={"kind": "JournalFullError", "message": "make room"})
    found = snapshot.read(tmp_path)
    assert found is not None and (found.step, found.state) == (4, "failed")
    moments.update(note="x" * 2 * snapshot.BLOCK_BYTES)  # finds no room: the one before stays, whole
    assert snapshot.read(tmp_path) == found
    assert [path.name for path in tmp_path.iterdir()] == [snapshot.FILE]
