"""Prometheus: the run's status at an HTTP address that its server reads from.

Families are made out of the last status when somebody reads, so that a worker or a state that is gone is gone there.
"""

import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from millrace.cluster.snapshot import Status
from millrace.cluster.trackers.tracker import Row, numbers
from millrace.core.config import Config
from millrace.core.errors import ConfigError


class PrometheusSettings(Config):
    """Of `tracking = [{ name = "prometheus", ... }]`."""

    port: int = Field(default=9100, ge=0, le=65535)
    """Where it is read; 0 picks a free one, which is said when the run starts."""

    address: str = "127.0.0.1"
    """Of this machine, to listen at; "0.0.0.0" lets other machines read."""


def probe(settings: PrometheusSettings) -> None:
    """Whether somebody listens at the port already.

    Raises:
        ConfigError: somebody does, or the address is not this machine's.
    """
    with socket.socket(socket.AF_INET6 if ":" in settings.address else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
        try:
            probe.bind((settings.address, settings.port))
        except OSError as caught:
            raise _refused(settings, caught) from None


def _refused(settings: PrometheusSettings, caught: OSError) -> ConfigError:
    return ConfigError(
        f"tracking prometheus: cannot listen at {settings.address} port {settings.port}: {caught.strerror or caught}; "
        "set another port, or port = 0 to have a free one picked"
    )


class Prometheus:
    """Implements `Tracker`; `package` is the module prometheus_client."""

    def __init__(self, settings: PrometheusSettings, package: Any) -> None:
        self._settings, self._package = settings, package
        self._status: Status | None = None
        self._row: Mapping[str, float] = {}
        self._server: Any = None
        self._thread: Any = None

    def start(self, config: Mapping[str, Any], directory: Path) -> str:
        port, address = self._settings.port, self._settings.address
        registry = self._package.CollectorRegistry()
        registry.register(self)
        try:
            self._server, self._thread = self._package.start_http_server(port, addr=address, registry=registry)
        except OSError as caught:
            raise _refused(self._settings, caught) from None
        return f"http://{address}:{self._server.server_port}/metrics"

    def step(self, step: int, row: Row) -> None:
        self._row = numbers(row)

    def evaluated(self, step: int, row: Row) -> None:
        pass

    def moment(self, status: Status) -> None:
        self._status = status

    def finish(self, status: Status) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def collect(self) -> Iterator[Any]:
        """Called by the registry at every reading, in the server's thread."""
        status, row = self._status, self._row
        if status is None:
            return
        for name, (text, label, values) in _families(status, row).items():
            family = self._package.metrics_core.GaugeMetricFamily(f"millrace_{name}", text, labels=("run", *label))
            for key, value in values.items():
                if value is not None:
                    family.add_metric((status.name, *((key,) if label else ())), value)
            yield family


def _families(
    status: Status, row: Mapping[str, float]
) -> dict[str, tuple[str, tuple[str, ...], Mapping[str, float | None]]]:
    """Name -> (meaning, its label if it has one, value by label)."""
    score = status.held_out
    one: dict[str, tuple[str, float | None]] = {
        "step": ("Optimiser steps made.", status.step),
        "steps": ("Optimiser steps of the whole run.", status.steps),
        "committed_step": ("The last step that a checkpoint holds.", status.committed_step),
        "version": ("Newest version of the weights.", status.version),
        "reward": ("Mean reward of the last step.", status.reward),
        "held_out": ("Mean reward of the last held-out evaluation.", score and score["mean"]),
        "held_out_step": ("The step that was evaluated.", score and score["step"]),
        "lag_mean": ("Mean lag of trained tokens of late, versions.", status.lag["mean"]),
        "lag_max": ("Bound of the lag, versions.", status.lag["max"]),
        "learner_wait_share": ("Share of its time that the learner waits.", status.learner["wait_share"]),
        "eta_seconds": ("Until the last step.", status.eta_s),
        "started_timestamp_seconds": ("Unix time at which this incarnation started.", status.started_s),
        "status_timestamp_seconds": ("Unix time of these numbers.", status.time_s),
    }
    for name, rate in status.rates.items():
        one[name.removesuffix("_per_s") + "_per_second"] = ("Of late.", float(str(rate)))
    several: dict[str, tuple[str, tuple[str, ...], Mapping[str, float | None]]] = {
        "state": ("1 for the state that the run is in.", ("state",), {status.state: 1}),
        "draws": ("Draws by state.", ("state",), dict(status.draws)),
        "tokens": ("Generated tokens by what became of them.", ("row",), dict(status.tokens)),
        "waiting": ("1 for every worker that waits.", ("worker",), dict.fromkeys(status.waits, 1)),
        "metric": ("Of the last step, as in metrics.jsonl.", ("name",), dict(row)),
    }
    return {name: (text, (), {"": value}) for name, (text, value) in one.items()} | several
