"""The real packages, without an account or a server; left out where they are not installed."""

from pathlib import Path
from typing import Any

import pytest

from millrace.cluster.snapshot import Status
from millrace.cluster.trackers.mlflow import Mlflow, MlflowSettings
from millrace.cluster.trackers.tracker import Tracker
from millrace.cluster.trackers.wandb import Wandb, WandbSettings

CONFIG: dict[str, Any] = {"name": "sorting", "model": "m", "loop": {"steps": 2, "max_lag": 1}}
ENDED = Status(id="/runs/x", state="finished", name="sorting")


def told(tracker: Tracker, directory: Path, *, steps: tuple[int, ...]) -> str:
    where = tracker.start(CONFIG, directory)
    for step in steps:
        tracker.step(step, {"step": step, "time_s": 1.0, "reward/mean": step / 10, "train/kl": None})
        tracker.moment(ENDED)
    tracker.evaluated(
        steps[0], {"step": steps[0], "held_out": {"step": steps[0], "mean": 0.5, "pass_at_k": {"4": 0.75}}}
    )
    tracker.finish(ENDED)
    return where


def test_mlflow_holds_curves_and_parameters_and_a_resumed_run_goes_on(tmp_path: Path) -> None:
    package = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    settings = MlflowSettings(uri=uri, experiment="tests")
    told(Mlflow(settings, package), tmp_path, steps=(1, 2))
    told(Mlflow(settings, package), tmp_path, steps=(3,))
    client = package.MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    assert (run.info.status, run.info.run_name) == ("FINISHED", "sorting")
    assert run.data.params["loop.max_lag"] == "1"
    history = [(each.step, each.value) for each in client.get_metric_history(run.info.run_id, "reward/mean")]
    assert sorted(history) == [(1, 0.1), (2, 0.2), (3, 0.3)]
    assert run.data.metrics["held_out/pass_at_4"] == 0.75


def test_wandb_offline_keeps_the_run_in_its_directory(tmp_path: Path) -> None:
    package = pytest.importorskip("wandb")
    settings = WandbSettings(mode="offline", project="tests", tags=("one",))
    where = told(Wandb(settings, package), tmp_path, steps=(1, 2))
    assert where.startswith(str(tmp_path))
    package.teardown()  # its process has written everything
    (kept,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    content = kept.read_bytes()
    missing = [name for name in ("reward/mean", "held_out/pass_at_4", "max_lag") if name.encode() not in content]
    assert missing == []
    first = (tmp_path / "trackers" / "wandb").read_text()
    told(Wandb(settings, package), tmp_path, steps=(3,))
    assert (tmp_path / "trackers" / "wandb").read_text() == first, "a resumed run goes on under its id"
    assert len(list(tmp_path.glob(f"wandb/offline-run-*-{first.strip()}"))) == 2
