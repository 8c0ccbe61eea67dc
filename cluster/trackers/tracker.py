"""What every tracker does: be told of a run, while it goes on."""

from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any, Protocol

from millrace.cluster.snapshot import Status

Row = Mapping[str, Any]


class Tracker(Protocol):
    """An outside system that keeps or shows numbers of runs. May raise whatever it likes, and may block."""

    def start(self, config: Mapping[str, Any], directory: Path) -> str:
        """A run begins, or goes on.

        Args:
            config: the run's, as plain values.
            directory: the run's; what the tracker must remember over a resumption it keeps below.
        Returns:
            Where a person finds it: an address, a directory.
        Raises:
            ConfigError: it cannot be reached as its settings say.
        """
        ...

    def step(self, step: int, row: Row) -> None:
        """An optimiser step was made; its row of metrics.jsonl."""
        ...

    def evaluated(self, step: int, row: Row) -> None:
        """The weights after `step` were evaluated; may come after later steps."""
        ...

    def moment(self, status: Status) -> None:
        """The run's status, about once a second."""
        ...

    def finish(self, status: Status) -> None:
        """The run has ended; nothing follows."""
        ...


def numbers(row: Row) -> dict[str, float]:
    """What can be drawn as a curve.

    >>> numbers({"step": 3, "time_s": 9.0, "train/loss": 0.5, "kl": None, "gap": float("inf"), "name": "x", "on": True})
    {'train/loss': 0.5}
    """
    return {
        name: float(value)
        for name, value in row.items()
        if isinstance(value, int | float)
        and not isinstance(value, bool)
        and isfinite(value)
        and name not in ("step", "time_s")
    }


def curves_of(row: Row) -> dict[str, float]:
    """The same of an evaluation: its mean and its shares of prompts solved.

    >>> curves_of({"held_out": {"step": 25, "mean": 0.5, "pass_at_k": {"1": 0.5, "4": 0.75}, "invalid": 0}})
    {'held_out/mean': 0.5, 'held_out/invalid': 0.0, 'held_out/pass_at_1': 0.5, 'held_out/pass_at_4': 0.75}
    """
    facts = row["held_out"]
    flat = {f"held_out/{name}": value for name, value in facts.items() if name not in ("step", "version", "pass_at_k")}
    flat |= {f"held_out/pass_at_{k}": value for k, value in (facts.get("pass_at_k") or {}).items()}
    return numbers(flat)


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, with dotted names.

    >>> flat({"loop": {"steps": 2}, "model": "m", "tags": ["a"]})
    {'loop.steps': 2, 'model': 'm', 'tags': ['a']}
    """
    found: dict[str, Any] = {}
    for name, value in table.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def remembered(directory: Path, name: str) -> str:
    """The id under which an earlier incarnation of the run is known to the tracker; empty if there was none."""
    path = directory / "trackers" / name
    return path.read_text(encoding="utf-8").strip() if path.is_file() else ""


def remember(directory: Path, name: str, known_as: str) -> None:
    """Keep that id, so that a resumed run goes on under it."""
    path = directory / "trackers" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(known_as + "\n", encoding="utf-8")
