"""A run directory -> report.html: style, code and numbers in one file that asks nobody for anything."""

import hashlib
import json
import re
import time
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from millrace.cluster.record import plain
from millrace.cluster.report.charts import charts
from millrace.cluster.report.facts import events, facts, incidents, tiles, waste
from millrace.cluster.report.read import Found, read
from millrace.cluster.run_directory import REPORT

SCRIPTS = ("dom.js", "charts.js", "incidents.js", "tokens.js", "rollouts.js", "page.js")
TONES = {"finished": "good", "failed": "bad", "stopped": "idle"}  # of other states: busy


def write(directory: Path, out: Path | None = None) -> Path:
    """Make the report of a run, whatever state it is in.

    Args:
        directory: of the run.
        out: the file to write; by default report.html in the directory.
    Returns:
        The file.
    Raises:
        ConfigError: it is no run directory.
    """
    text = page(contents(read(directory)))
    out = directory / REPORT if out is None else out
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    return partial.replace(out)


def contents(found: Found) -> dict[str, Any]:
    """What the page shows, as plain JSON values."""
    made: dict[str, Any] = plain(
        {
            "name": found.table.get("name") or found.directory.name,
            "state": found.state,
            "tone": TONES.get(found.state, "busy"),
            "error": found.error,
            "made_s": time.time(),
            "tiles": tiles(found),
            "facts": facts(found),
            "waste": waste(found),
            "charts": [chart.as_json() for chart in charts(found)],
            "incidents": incidents(found),
            "events": events(found),
            "missing": found.missing,
        }
    )
    return made | {"rollouts": found.rollouts}  # the bulk of it, and plain as it was read


@dataclass(frozen=True, slots=True)
class _Parts:
    style: str
    script: str


def _parts() -> _Parts:
    folder = files("millrace.cluster.report")
    script = "\n".join((folder / name).read_text(encoding="utf-8") for name in SCRIPTS)
    return _Parts((folder / "page.css").read_text(encoding="utf-8"), f'(() => {{\n"use strict";\n{script}}})();\n')


def page(values: Mapping[str, Any]) -> str:
    """The whole file. Its policy lets nothing run but its own script, and nothing be fetched."""
    parts = _parts()
    filled = {
        "title": _as_text(str(values["name"])),
        "policy": (
            f"default-src 'none'; script-src '{_digest(parts.script)}'; style-src '{_digest(parts.style)}'; "
            "img-src data:; base-uri 'none'; form-action 'none'"
        ),
        "style": parts.style,
        "data": embedded(values),
        "script": parts.script,
    }
    template = (files("millrace.cluster.report") / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda place: filled[place[1]], template)


def embedded(values: Any) -> str:
    """JSON that may stand inside a script element: whatever the texts hold, they cannot end it.

    >>> embedded({"prompt": "</script><!-- & é"})
    '{"prompt":"\\\\u003c/script\\\\u003e\\\\u003c!-- \\\\u0026 \\\\u00e9"}'
    """
    text = json.dumps(values, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _as_text(value: str) -> str:
    return value.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _digest(text: str) -> str:
    """As a content security policy names what may run."""
    return f"sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
