"""What a run that starts Ray needs, whatever the check of it finds: Ray itself, and the imports of its engines.

Both take seconds, as the check does. A driver that exists for one run alone begins them beside it.
"""

import os
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from millrace.actors.engines import ENGINES, imported
from millrace.cluster import guard
from millrace.cluster.config import RunConfig
from millrace.core.catalogue import split
from millrace.core.errors import ConfigError
from millrace.core.references import find_beside

WORKER = "millrace.actors.generation:GenerationWorker"


class Ahead:
    """Ray of one run; from `begin` on it starts in a thread."""

    def __init__(self) -> None:
        # The system ends Ray's daemons with the thread that started them: this one ends last.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self._starting: Future[Any] | None = None
        self._ray = ExitStack()

    def begin(self, config: RunConfig) -> None:
        """Start Ray on this machine, and a process for each engine, which imports what it needs.

        Raises:
            ConfigError: the engine is not spelled as one.
        """
        if (mark := os.environ.get(guard.MARK)) is None:
            return
        engine, _ = split(config.generation.engine, slot="generation.engine", error=ConfigError)
        judged = config.verifier is not None  # without, no engine generates
        workers = config.generation.workers if judged and engine in ENGINES else 0
        find_beside(Path.cwd())  # Ray's processes look where this one does when it starts
        guard.guard_early(mark)
        # Imported here: two threads that import the same package meet each other's half.
        runtime, spawns = (import_module(f"millrace.cluster.{name}") for name in ("runtime", "spawn"))

        def start() -> Any:
            self._ray.enter_context(runtime.ray_cluster())
            spawn = spawns.OnRay()
            for number in range(workers):
                name = f"generation-{number}"
                spawn.ahead(WORKER, partial(imported, engine), name=name, gpus=config.generation.gpus)
            return spawn

        self._starting = self._thread.submit(start)

    @contextmanager
    def cluster(self, address: str | None) -> Iterator[Any]:
        """Ray for one job, as `ray_cluster` gives it, with the way to spawn components in it."""
        if self._starting is None:
            runtime, spawns = (import_module(f"millrace.cluster.{name}") for name in ("runtime", "spawn"))
            with runtime.ray_cluster(address):
                yield spawns.OnRay()
            return
        starting, self._starting = self._starting, None
        try:
            with self._ray:
                yield starting.result()
        finally:
            self._thread.shutdown()

    def abandon(self, status: int) -> None:
        """There is nothing to run. Does not return where something was begun: the process ends with it."""
        if self._starting is not None:
            guard.end_early()
            sys.stderr.flush()
            os._exit(status)
