"""What a Prometheus server reads is the run's status, as it is at the reading."""

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from urllib.request import urlopen

import pytest

from millrace.cluster.snapshot import Status
from millrace.cluster.trackers.kinds import check
from millrace.cluster.trackers.prometheus import Prometheus, PrometheusSettings
from millrace.core.errors import ConfigError

STATUS = Status(
    id="/runs/x",
    state="running",
    name="sorting",
    step=7,
    steps=20,
    version=7,
    reward=0.25,
    lag={"mean": 0.5, "max": 4},
    draws={"waiting": 3, "in_step": 16},
    tokens={"generated": 100, "trained": 80, "filtered:zero_variance": 20},
    rates={"generated_tokens_per_s": 12.0, "trained_tokens_per_s": 10.0, "samples_per_s": 1.5},
    learner={"phase": "computing", "phase_s": 0.1, "wait_share": 0.125},
    waits={"generation-0": "nothing to do"},
)


@pytest.fixture
def client() -> ModuleType:
    found: ModuleType = pytest.importorskip("prometheus_client")
    return found


def read(where: str) -> list[str]:
    with urlopen(where, timeout=10) as answer:
        return [line for line in answer.read().decode().splitlines() if not line.startswith("#")]


def test_numbers_are_read_with_their_labels(client: ModuleType, tmp_path: Path) -> None:
    one = Prometheus(PrometheusSettings(port=0), client)
    where = one.start({}, tmp_path)
    try:
        assert read(where) == [], "nothing is said before there is a status"
        one.moment(STATUS)
        one.step(7, {"step": 7, "train/loss": 0.5, "train/entropy": None})
        lines = read(where)
        for line in (
            'millrace_step{run="sorting"} 7.0',
            'millrace_reward{run="sorting"} 0.25',
            'millrace_lag_max{run="sorting"} 4.0',
            'millrace_generated_tokens_per_second{run="sorting"} 12.0',
            'millrace_samples_per_second{run="sorting"} 1.5',
            'millrace_learner_wait_share{run="sorting"} 0.125',
            'millrace_state{run="sorting",state="running"} 1.0',
            'millrace_draws{run="sorting",state="in_step"} 16.0',
            'millrace_tokens{row="filtered:zero_variance",run="sorting"} 20.0',
            'millrace_waiting{run="sorting",worker="generation-0"} 1.0',
            'millrace_metric{name="train/loss",run="sorting"} 0.5',
        ):
            assert line in lines
        assert not [line for line in lines if line.startswith(("millrace_held_out", "millrace_eta"))]
        one.moment(replace(STATUS, waits={}, held_out={"step": 5, "mean": 0.75}))
        lines = read(where)
        assert 'millrace_held_out{run="sorting"} 0.75' in lines
        assert not [line for line in lines if line.startswith("millrace_waiting")], "who no longer waits is gone"
    finally:
        one.finish(STATUS)
    with pytest.raises(OSError, match=r"refused|reset"):
        read(where)


def test_a_port_in_use_is_said_with_the_way_out(client: ModuleType, tmp_path: Path) -> None:
    first = Prometheus(PrometheusSettings(port=0), client)
    port = int(first.start({}, tmp_path).split(":")[2].split("/")[0])
    try:
        said = rf"port {port}: Address already in use; set another port, or port = 0"
        with pytest.raises(ConfigError, match=said):
            Prometheus(PrometheusSettings(port=port), client).start({}, tmp_path)
        with pytest.raises(ConfigError, match=said):
            check([{"name": "prometheus", "port": port}])
    finally:
        first.finish(STATUS)
