"""Weights & Biases: one of its runs per run, continued when the run is resumed.

Its own counter of steps only grows, and evaluations come late: steps are therefore logged as numbers of their own,
which its charts are told to use as their axis.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from millrace.cluster.snapshot import Status
from millrace.cluster.trackers.tracker import Row, curves_of, numbers, remember, remembered
from millrace.core.config import Config


class WandbSettings(Config):
    """Of `tracking = [{ name = "wandb", ... }]`. An account is taken from `wandb login` or WANDB_API_KEY."""

    project: str = "millrace"
    """Its project."""

    entity: str | None = None
    """Its team or user; by default the account's own."""

    group: str | None = None
    """Runs that belong together."""

    tags: tuple[str, ...] = ()
    """Words to find the run by."""

    mode: Literal["online", "offline", "disabled"] | None = None
    """"offline" needs no account: `wandb sync` sends it later. By default what WANDB_MODE says, else "online"."""


class Wandb:
    """Implements `Tracker`; `package` is the module wandb."""

    def __init__(self, settings: WandbSettings, package: Any) -> None:
        self._settings, self._package = settings, package
        self._run: Any = None

    def start(self, config: Mapping[str, Any], directory: Path) -> str:
        settings = self._settings
        known_as = remembered(directory, "wandb")
        self._run = self._package.init(
            project=settings.project,
            entity=settings.entity,
            group=settings.group,
            tags=list(settings.tags) or None,
            name=config.get("name") or directory.name,
            id=known_as or None,
            resume="allow",
            dir=str(directory),
            config=dict(config),
            mode=settings.mode,
            settings=self._package.Settings(console="off", silent=True),
        )
        remember(directory, "wandb", self._run.id)
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        self._run.define_metric("held_out/step", hidden=True)
        self._run.define_metric("held_out/*", step_metric="held_out/step")
        return str(Path(self._run.dir).parent if self._run.offline else self._run.url)

    def step(self, step: int, row: Row) -> None:
        self._run.log({"step": step, **numbers(row)})

    def evaluated(self, step: int, row: Row) -> None:
        self._run.log({"held_out/step": step, **curves_of(row)})

    def moment(self, status: Status) -> None:
        pass

    def finish(self, status: Status) -> None:
        self._run.summary["state"] = status.state
        self._run.finish(exit_code=1 if status.state == "failed" else 0)
