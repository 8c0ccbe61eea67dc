"""What went down and came back, out of events.jsonl: one incident per component that was lost.

{"kind": "lost", "component": "generation-0", "cause": "its process ended by signal 9", ...}
{"kind": "restarting", "component": "generation-0", "in_s": 0.5, "restart": 1, "of": 10}
{"kind": "serving", "component": "generation-0", "pid": 12, "down_s": 2.3}
"""

import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from millrace.cluster.progress import seconds

Event = Mapping[str, Any]

BEGINS = ("started", "resumed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Incident:
    """A component was lost."""

    component: str
    cause: str
    time_s: float  # unix, when it was noticed
    down_s: float | None = None  # until it served again; None: it did not, as far as is known
    given_up: bool = False

    @property
    def role(self) -> str:
        """generation | reward | learner | held-out | queue | weights"""
        return role_of(self.component)

    def __str__(self) -> str:
        return said(self.component, self.cause, down_s=self.down_s, given_up=self.given_up)


def role_of(component: str) -> str:
    """The component without its number.

    >>> role_of("generation-12"), role_of("held-out")
    ('generation', 'held-out')
    """
    return re.sub(r"-\d+$", "", component)


def said(component: str, cause: str, *, down_s: float | None = None, given_up: bool = False) -> str:
    """An incident in one line, as status.json has the last one.

    >>> said("generation-0", "its process ended by signal 9", down_s=2.34)
    'generation-0 was lost: its process ended by signal 9; back after 2.3 s'
    >>> said("queue", "queue: no memory", given_up=True)
    'queue was lost: no memory; given up'
    """
    end = "; given up" if given_up else f"; back after {seconds(down_s)}" if down_s is not None else ""
    return f"{component} was lost: {' '.join(cause.removeprefix(f'{component}: ').split())}{end}"


def read(path: Path) -> list[Event]:
    """The rows of events.jsonl of all incarnations, without lines that a driver's death has torn."""
    found: list[Event] = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


def incidents(events: Iterable[Event]) -> list[Incident]:
    """Of all incarnations of a run, in the order in which they were noticed.

    Args:
        events: rows of events.jsonl, in order. A component that an ended incarnation left down stays down.
    """
    found: list[Incident] = []
    down: dict[str, int] = {}  # component -> its open incident
    for event in events:
        kind, component = event.get("kind"), str(event.get("component", ""))
        if kind in BEGINS:
            down.clear()
        elif kind == "lost":
            down[component] = len(found)
            found.append(Incident(component=component, cause=str(event.get("cause", "")), time_s=event["time_s"]))
        elif kind in ("serving", "given up") and component in down:
            at = down.pop(component)
            down_s = event.get("down_s") or event["time_s"] - found[at].time_s
            found[at] = replace(found[at], **({"given_up": True} if kind == "given up" else {"down_s": float(down_s)}))
    return found


def recovery_s(found: Iterable[Incident]) -> dict[str, list[float]]:
    """Seconds from the loss of a component until it served again, by role."""
    times: dict[str, list[float]] = {}
    for each in found:
        if each.down_s is not None:
            times.setdefault(each.role, []).append(each.down_s)
    return times


def quarantined(events: Iterable[Event]) -> list[dict[str, Any]]:
    """Prompts that were given up, in order; what is as long as a traceback is left to events.jsonl.

    Draws that were made again, because a run was resumed from before them, are told once.
    """
    found: dict[tuple[Any, Any], dict[str, Any]] = {}
    for event in events:
        if event.get("kind") == "quarantined":
            facts = {name: value for name, value in event.items() if name not in ("kind", "time_s", "traceback")}
            found[event.get("draw"), event.get("attempt")] = facts
    return list(found.values())
