"""What a run leaves behind while it runs: metrics.jsonl, events.jsonl and TensorBoard's files.

Numbers are returned upwards by the components and written here, in one place.
"""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter


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
        self._metrics = (directory / "metrics.jsonl").open("a", buffering=1)
        self._events = (directory / "events.jsonl").open("a", buffering=1)
        self._board = EventFileWriter(str(directory / "tensorboard"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._metrics.close()
        self._events.close()
        self._board.close()

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """One row of metrics.jsonl; its numbers also go to TensorBoard under the same names."""
        now = time.time()
        row = plain({"step": step, "time_s": now, **values})
        self._metrics.write(json.dumps(row) + "\n")
        scalars = [
            Summary.Value(tag=name, simple_value=float(value))
            for name, value in row.items()
            if isinstance(value, int | float) and name not in ("step", "time_s")
        ]
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
        self._metrics = path.open("a", buffering=1)
        return [json.loads(line) for line in lines]

    def event(self, kind: str, **facts: Any) -> None:
        """One row of events.jsonl: who joined, left, failed, and why."""
        self._events.write(json.dumps(plain({"time_s": time.time(), "kind": kind, **facts})) + "\n")
