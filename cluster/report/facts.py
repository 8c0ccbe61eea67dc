"""What stands above the curves: the run in a few numbers, what it was made of, where its tokens went."""

import json
import time
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

from millrace.cluster.incidents import incidents as find
from millrace.cluster.incidents import recovery_s
from millrace.cluster.progress import count, duration, seconds
from millrace.cluster.report.read import Found, Row
from millrace.cluster.result import packages
from millrace.core.errors import MillraceError
from millrace.learner.objective import Objective

EVENTS = 200  # the last so many
WASTE_SAID = {
    "trained": "in the loss",
    "masked": "left out of the loss: too old, not selected, or without a verdict",
    "reused": "read again by further uses of their groups; not part of the sum",
    "in_flight": "being generated",
    "queued": "waiting to be judged or trained",
    "failed:crashed": "in hand in a process that was lost",
    "failed:engine": "the engine failed on them",
    "failed:judge": "no verdict could be had",
    "unaccounted": "what the books cannot explain; 0 if they are right",
}


def tiles(found: Found) -> list[dict[str, str]]:
    """The numbers that are asked for first: `label`, `value`, and where it began, `first`."""
    steps = max((row["step"] for row in found.rows), default=0)
    planned = None if found.config is None or found.supervised else found.config.loop.steps
    made = [_tile("steps", f"{steps:,} of {planned:,}" if planned else f"{steps:,}")]
    if found.rows:
        made.append(_tile("duration", duration(_seconds(found))))
    rewards = [row["reward/mean"] for row in found.rows if row.get("reward/mean") is not None]
    held_out = [each["mean"] for each in found.held_out if each["mean"] is not None]
    if rewards:
        made.append(_tile("reward", f"{rewards[-1]:.3f}", first=f"{rewards[0]:.3f}"))
    if held_out:
        made.append(_tile("held-out", f"{held_out[-1]:.3f}", first=f"{held_out[0]:.3f}"))
    if not rewards and found.rows:
        losses = [row["train/loss"] for row in found.rows]
        made.append(_tile("loss", f"{losses[-1]:.3f}", first=f"{losses[0]:.3f}"))
    rollouts = sum(row.get("rollout/count", 0) for row in found.rows)
    if rollouts:
        seconds = _seconds(found)
        made.append(_tile("trained rollouts", count(rollouts)))
        made.append(_tile("trained tokens/s", count(sum(r["train/tokens"] for r in found.rows) / max(seconds, 1e-9))))
    return made


def _tile(label: str, value: str, *, first: str = "") -> dict[str, str]:
    return {"label": label, "value": value, "first": first}


def _seconds(found: Found) -> float:
    """At work, over all incarnations; a supervised run records no durations, but when each row was written."""
    if all("time/step_s" in row for row in found.rows):
        return float(sum(row["time/step_s"] for row in found.rows))
    return float(found.rows[-1]["time_s"] - found.rows[0]["time_s"])


def facts(found: Found) -> list[list[str]]:
    """Pairs of a name and what it is, in the order of reading."""
    table = found.table
    recipe, loop = table.get("recipe", {}), table.get("loop", {})
    made = [["Recipe", str(recipe.get("origin", ""))]]
    if found.config is not None:
        made.append(["Formula", _formula(found)])
        rewards = found.config.recipe.rewards
        if not found.supervised:
            made.append(["Verifier", _method(found.config.verifier)])
        for name in ("shapers", "filters"):
            if methods := getattr(rewards, name):
                made.append([name.capitalize(), ", ".join(map(_method, methods))])
    made.append(["Model", str(table.get("model", ""))])
    if "reference" in table:
        made.append(["Reference", str(table["reference"])])
    made += [[f"Data, {name}", str(path)] for name, path in table.get("data", {}).items() if name in _DATA]
    if not found.supervised and loop:
        made.append(["Loop", ", ".join(f"{key} = {value}" for key, value in loop.items())])
    made.append(["Seed", str(table.get("seed", 0))])
    versions = found.result.get("packages") or packages()
    said = "Packages" if "packages" in found.result else "Packages, of this report"
    made.append([said, ", ".join(f"{name} {version}" for name, version in versions.items())])
    if found.result.get("checkpoint"):
        made.append(["Last checkpoint", str(found.result["checkpoint"])])
    made.append(["Directory", str(found.directory)])
    return [[name, value] for name, value in made if value]


_DATA = ("train", "held_out")


def _formula(found: Found) -> str:
    """The composed loss, in words."""
    assert found.config is not None
    models = frozenset({"reference"} if found.config.reference else ())
    try:
        return str(Objective.of(found.config.recipe.objective, models=models))
    except MillraceError as caught:
        return f"cannot be composed here: {caught}"


def _method(spec: Any) -> str:
    """A name, and its settings in brackets."""
    if not isinstance(spec, Mapping):
        return "" if spec is None else str(spec)
    settings = ", ".join(f"{key} = {json.dumps(value)}" for key, value in spec.items() if key != "name")
    return f"{spec['name']} ({settings})" if settings else str(spec["name"])


def waste(found: Found) -> list[dict[str, Any]]:
    """The rows of the waste ledger, `generated` first; empty where nobody kept it."""
    tokens = found.tokens
    whole = tokens.get("generated", 0)
    return [
        {
            "name": name.replace("_", " "),
            "about": "by the engines' own counters" if name == "generated" else WASTE_SAID.get(name, ""),
            "tokens": many,
            "share": many / whole if whole else 0.0,
        }
        for name, many in tokens.items()
    ]


def incidents(found: Found) -> dict[str, Any]:
    """What was lost and came back: each incident at its step, recovery by role, prompts that were given up."""
    lost = find(found.events)
    times: dict[str, list[float]] = recovery_s(lost)
    roles = dict.fromkeys(each.role for each in lost)
    return {
        "steps": max((row["step"] for row in found.rows), default=0),
        "lost": [
            {
                "component": each.component,
                "cause": " ".join(each.cause.split()),
                "time": _at(each.time_s),
                "step": _step_at(found.rows, each.time_s),
                "back": None if each.down_s is None else _step_at(found.rows, each.time_s + each.down_s),
                "down": "given up" if each.given_up else "" if each.down_s is None else seconds(each.down_s),
            }
            for each in lost
        ],
        "roles": [
            {
                "role": role,
                "lost": sum(each.role == role for each in lost),
                "mean": seconds(sum(times[role]) / len(times[role])) if role in times else "",
                "most": seconds(max(times[role])) if role in times else "",
            }
            for role in roles
        ],
        "quarantined": [
            {
                "prompt": str(event.get("prompt", "")),
                "cause": " ".join(str(event.get("cause", "")).split()),
                "times": event.get("times"),
                "traceback": str(event.get("traceback") or ""),
            }
            for event in found.events
            if event.get("kind") == "quarantined"
        ],
    }


def _step_at(rows: Sequence[Row], time_s: float) -> float:
    """Where on the axis of steps a moment lies: between the step that was made before it and the one after."""
    after = bisect_right(rows, time_s, key=lambda row: float(row.get("time_s", 0.0)))
    if after == len(rows):
        return float(rows[-1]["step"]) if rows else 0.0
    high = rows[after]
    step, low_s = (rows[after - 1]["step"], rows[after - 1]["time_s"]) if after else (0, None)
    long_s = high["time_s"] - low_s if low_s is not None else high.get("time/step_s") or 1.0
    part = 1 - (high["time_s"] - time_s) / long_s if long_s > 0 else 0.0
    return float(step + (high["step"] - step) * max(0.0, part))


def _at(time_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(time_s))


def events(found: Found) -> list[dict[str, str]]:
    """What happened, the last first: `time`, `kind`, and the other facts as text."""
    return [
        {
            "time": _at(event.get("time_s", 0)),
            "kind": str(event.get("kind", "")),
            "facts": "; ".join(
                f"{key} {_fact(value)}" for key, value in event.items() if key not in ("time_s", "kind")
            ),
        }
        for event in reversed(found.events[-EVENTS:])
    ]


def _fact(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return value if isinstance(value, str) else json.dumps(value)
