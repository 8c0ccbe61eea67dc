"""What is wrong with `tracking` is said before anything starts, and nothing is imported that was not asked for."""

import subprocess
import sys
from pathlib import Path

import pytest

from millrace.cluster.trackers import kinds
from millrace.cluster.trackers.kinds import KINDS, Kind, check, tracker
from millrace.cluster.trackers.prometheus import Prometheus, PrometheusSettings
from millrace.core.errors import ConfigError


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = Kind(PrometheusSettings, Prometheus, "a_package_that_nobody_has", "pip install it")
    monkeypatch.setitem(KINDS, "wandb", absent)
    with pytest.raises(ConfigError, match="tracking wandb: the package is not installed here: pip install it"):
        check(["wandb"])


def test_a_directory_of_the_package_s_name_is_not_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tracker_droppings").mkdir()  # as `wandb/`, which wandb leaves where it ran
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(KINDS, "wandb", Kind(PrometheusSettings, Prometheus, "tracker_droppings", "pip install wandb"))
    with pytest.raises(ConfigError, match="pip install wandb"):
        check(["wandb"])


def test_mistakes_are_said_with_the_nearest_right_word() -> None:
    with pytest.raises(ConfigError, match="did you mean 'prometheus'"):
        check(["promethius"])
    with pytest.raises(ConfigError, match="tracking wandb: unknown key|did you mean 'project'"):
        check([{"name": "wandb", "projct": "x"}])
    with pytest.raises(ConfigError, match=r"tracking prometheus: port: .* \(got 70000\)"):
        check([{"name": "prometheus", "port": 70000}])
    with pytest.raises(ConfigError, match="tracking names prometheus 2 times"):
        check(["prometheus", {"name": "prometheus", "port": 0}])


def test_a_package_that_cannot_be_imported_is_a_configuration_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_tracker.py").write_text("raise OSError('libx.so is missing')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(kinds.KINDS, "wandb", Kind(PrometheusSettings, Prometheus, "broken_tracker", "-"))
    check(["wandb"])
    with pytest.raises(ConfigError, match="importing broken_tracker raised OSError: libx.so is missing"):
        tracker("wandb")


def test_nothing_of_theirs_is_imported_before_it_is_asked_for() -> None:
    code = (
        "import sys; from millrace.cluster.trackers import check; check(['prometheus']); "
        "print([name for name in ('wandb', 'mlflow', 'prometheus_client') if name in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "[]"
