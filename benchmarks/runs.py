"""Whole runs on Ray for the benchmarks: what they leave, and actors that are pinned to cores."""

import asyncio
import json
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from millrace.cluster import config as configs
from millrace.cluster.config import RunConfig
from millrace.cluster.plan import make_plan
from millrace.cluster.process import Component, found
from millrace.cluster.run import Run
from millrace.cluster.spawn import OnRay

Cores = Mapping[str, Collection[int]]  # the beginning of an actor's name -> cores it may use


@dataclass(frozen=True, slots=True)
class Finished:
    """What a run left."""

    directory: Path
    result: Mapping[str, Any]  # result.json

    def metrics(self) -> list[dict[str, Any]]:
        """Rows of metrics.jsonl, one per step, without those of held-out evaluations."""
        lines = (self.directory / "metrics.jsonl").read_text().splitlines()
        return [row for line in lines if "time/step_s" in (row := json.loads(line))]

    def steps_per_s(self, skipped: int) -> float:
        """Without its first steps, which wait for engines and caches."""
        spent = [row["time/step_s"] for row in self.metrics()][skipped:]
        return len(spent) / sum(spent)


class PinnedOnRay(OnRay):
    """Spawns actors that may use certain cores only, each with one computing thread."""

    def __init__(self, cores: Cores) -> None:
        super().__init__()
        self._cores = cores

    def __call__(self, component: Component, *args: Any, name: str, **kwargs: Any) -> Any:
        cores = next((cores for begin, cores in self._cores.items() if name.startswith(begin)), None)
        return super().__call__(pinned(found(component), cores) if cores else component, *args, name=name, **kwargs)


def pinned(cls: type, cores: Collection[int]) -> type:
    """The class, whose process is pinned to these cores when it is constructed; its later threads are, too."""
    allowed = frozenset(cores)

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        for thread in os.listdir("/proc/self/task"):
            os.sched_setaffinity(int(thread), allowed)
        cls.__init__(self, *args, **kwargs)  # type: ignore[misc]  # of the class that is pinned

    return type(cls.__name__, (cls,), {"__init__": __init__})


def execute(
    table: Mapping[str, Any],
    *,
    root: Path,
    name: str,
    spawn: OnRay | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Finished:
    """Run a configuration to its end on the Ray cluster of this process (`ray_cluster()`), its actors with it.

    Args:
        table: the run, as in its TOML file; relative paths start at `root`.
        name: of the run; its directory is below `root/runs`.
    """
    config: RunConfig = configs.of(dict(table), root=root, source="benchmark", name=name)
    config.directory.mkdir(parents=True)
    spawn = spawn or OnRay()
    try:
        result = asyncio.run(Run(make_plan(config), spawn=spawn, resume=False, say=say).execute())
    finally:
        spawn.kill()
    return Finished(config.directory, result)
