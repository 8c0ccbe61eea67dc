"""What a run leaves behind while it runs: metrics.jsonl, events.jsonl and TensorBoard's files.

Numbers are returned upwards by the components and written here, in one place.
"""

import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from millrace.cluster.lines import Lines


def plain(value: Any) -> Any:
    """A JSON value: numpy scalars become Python's, numbers that JSON lacks become null.

    >>> plain({"a": np.float32(1.5), "b": float("nan")})
    {'a': 1.5, 'b': None}
    """
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


class Recorder:
    """Writes one run directory. Every line is on its way to the disk when the call returns."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.listeners: list[Callable[[int, Mapping[str, Any]], None]] = []  # get every row of metrics.jsonl, too
        self._metrics, self._events = Lines(directory / "metrics.jsonl"), Lines(directory / "events.jsonl")
        self._full = False
        self._board = EventFileWriter(str(directory / "tensorboard"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._metrics.close()
        self._events.close()
        with suppress(OSError):
            self._board.close()

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """One row of metrics.jsonl; its numbers also go to TensorBoard under the same names."""
        now = time.time()
        row = plain({"step": step, "time_s": now, **values})
        self._write(self._metrics, row)
        scalars = [
            Summary.Value(tag=name, simple_value=float(value))
            for name, value in row.items()
            if isinstance(value, int | float) and name not in ("step", "time_s")
        ]
        with suppress(OSError):  # TensorBoard's files are made anew by a resumed run
            self._board.add_event(Event(wall_time=now, step=step, summary=Summary(value=scalars)))
        for listener in self.listeners:
            listener(step, row)

    def rewind(self, step: int) -> list[dict[str, Any]]:
        """Forget the rows of metrics.jsonl beyond `step`, which will be made again. Returns those that stay."""
        path = self.directory / "metrics.jsonl"
        whole, _, _torn = path.read_bytes().rpartition(b"\n")
        lines = [line for line in whole.splitlines() if json.loads(line)["step"] <= step]
        partial = path.with_suffix(".partial")
        partial.write_bytes(b"".join(line + b"\n" for line in lines))
        self._metrics.close()
        partial.replace(path)
        self._metrics = Lines(path)
        return [json.loads(line) for line in lines]

    def event(self, kind: str, **facts: Any) -> None:
        """One row of events.jsonl: who joined, left, failed, and why."""
        self._write(self._events, plain({"time_s": time.time(), "kind": kind, **facts}))

    def _write(self, lines: Lines, row: Mapping[str, Any]) -> None:
        """One row; on a full disk it waits, and so does the word that it did."""
        why = lines.write(json.dumps(row))
        if why and not self._full:
            self._full = True
            self.event("disk full", why=why)
        elif not why:
            self._full = False
