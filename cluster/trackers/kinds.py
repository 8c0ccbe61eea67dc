"""Which trackers there are, and what each takes. Nothing of theirs is imported before one is asked for."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from millrace.cluster.trackers.mlflow import Mlflow, MlflowSettings
from millrace.cluster.trackers.prometheus import Prometheus, PrometheusSettings, probe
from millrace.cluster.trackers.tracker import Tracker
from millrace.cluster.trackers.wandb import Wandb, WandbSettings
from millrace.core.catalogue import Spec, split
from millrace.core.config import Config
from millrace.core.errors import ConfigError, boundary, nearest


@dataclass(frozen=True, slots=True)
class Kind:
    """A tracker, the settings it takes, and the module it is made with."""

    settings: type[Config]
    make: Callable[[Any, Any], Tracker]  # settings, module -> tracker
    module: str
    install: str
    probe: Callable[[Any], None] = lambda settings: None  # raises ConfigError where the settings cannot work here


KINDS = {
    "wandb": Kind(WandbSettings, Wandb, "wandb", "pip install wandb"),
    "mlflow": Kind(MlflowSettings, Mlflow, "mlflow", "pip install mlflow"),
    "prometheus": Kind(PrometheusSettings, Prometheus, "prometheus_client", "pip install prometheus-client", probe),
}


def check(specs: Sequence[Spec]) -> None:
    """Before anything starts: every tracker exists, is installed, and takes the settings it is given.

    Raises:
        ConfigError: with what to install or to write instead.

    >>> check(["prometheus"])
    >>> check(["tensorboard"])
    Traceback (most recent call last):
    millrace.core.errors.ConfigError: tracking: there is no tracker 'tensorboard'. There are wandb, mlflow, prometheus
    """
    chosen = [_checked(spec) for spec in specs]
    names = [name for name, _ in chosen]
    for name, settings in chosen:
        KINDS[name].probe(settings)
        if names.count(name) > 1:
            raise ConfigError(f"tracking names {name} {names.count(name)} times: a run has one of each kind")


def tracker(spec: Spec) -> tuple[str, Tracker]:
    """A tracker's name, and the tracker, not started yet.

    Raises:
        ConfigError: as `check` does; or its package cannot be imported.
    """
    name, settings = _checked(spec)
    with boundary(f"tracking {name}: importing {KINDS[name].module}", ConfigError):
        module = importlib.import_module(KINDS[name].module)
    return name, KINDS[name].make(settings, module)


def _checked(spec: Spec) -> tuple[str, Config]:
    name, settings = split(spec, slot="tracking", error=ConfigError)
    if name not in KINDS:
        close = nearest(name, KINDS) or "."
        raise ConfigError(f"tracking: there is no tracker '{name}'{close} There are {', '.join(KINDS)}")
    kind = KINDS[name]
    checked = kind.settings.parse(settings, source=f"tracking {name}")
    found = find_spec(kind.module)
    if found is None or found.origin is None:  # a mere directory of that name, as trackers leave them, has no origin
        raise ConfigError(
            f"tracking {name}: the package is not installed here: {kind.install}, or leave {name} out of tracking"
        )
    return name, checked
