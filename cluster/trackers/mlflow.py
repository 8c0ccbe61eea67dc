"""MLflow: one of its runs per run, continued when the run is resumed."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from millrace.cluster.snapshot import Status
from millrace.cluster.trackers.tracker import Row, curves_of, flat, numbers, remember, remembered
from millrace.core.config import Config

LONGEST_VALUE = 500  # characters of a parameter, which every version of its stores takes
ENDINGS = {"finished": "FINISHED", "failed": "FAILED"}  # anything else was stopped: KILLED


class MlflowSettings(Config):
    """Of `tracking = [{ name = "mlflow", ... }]`."""

    uri: str | None = None
    """A server, a database or a directory; by default what MLFLOW_TRACKING_URI says, else MLflow's own default."""

    experiment: str = "millrace"
    """Made if there is none of this name."""


class Mlflow:
    """Implements `Tracker`; `package` is the module mlflow."""

    def __init__(self, settings: MlflowSettings, package: Any) -> None:
        self._settings, self._package = settings, package
        self._client: Any = None
        self._run = ""

    def start(self, config: Mapping[str, Any], directory: Path) -> str:
        self._client = self._package.MlflowClient(tracking_uri=self._settings.uri)
        found = self._client.get_experiment_by_name(self._settings.experiment)
        experiment = found.experiment_id if found else self._client.create_experiment(self._settings.experiment)
        self._run = remembered(directory, "mlflow")
        if self._run:
            self._client.update_run(self._run, status="RUNNING")
        else:
            name = str(config.get("name") or directory.name)
            self._run = self._client.create_run(experiment, run_name=name).info.run_id
            remember(directory, "mlflow", self._run)
            for key, value in flat(config).items():
                self._client.log_param(self._run, key, str(value)[:LONGEST_VALUE])
        uri = self._settings.uri or self._package.get_tracking_uri()
        return f"run {self._run} of experiment {self._settings.experiment} at {uri}"

    def step(self, step: int, row: Row) -> None:
        self._log(step, numbers(row))

    def evaluated(self, step: int, row: Row) -> None:
        self._log(step, curves_of(row))

    def moment(self, status: Status) -> None:
        pass

    def finish(self, status: Status) -> None:
        self._client.set_terminated(self._run, status=ENDINGS.get(status.state, "KILLED"))

    def _log(self, step: int, values: Mapping[str, float]) -> None:
        now_ms = int(time.time() * 1000)
        metric = self._package.entities.Metric
        self._client.log_batch(self._run, metrics=[metric(name, each, now_ms, step) for name, each in values.items()])
