"""Numbers and facts as short texts of a known width. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from rich.text import Text

from millrace.cluster.view.charts import Glyphs, Value

HIDDEN = ("time_s", "kind", "traceback")  # of an event, on a screen


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a line, with its colour."""

    text: str
    style: str = ""


def number(value: Value, digits: int = 3) -> str:
    """A value, or a dash where there is none.

    >>> number(0.5), number(None), number(float("nan"))
    ('0.500', '-', '-')
    """
    return "-" if value is None or not isfinite(value) else f"{value:.{digits}f}"


def percent(share: float) -> str:
    """A share; what is not nothing is not 0%.

    >>> percent(0.314), percent(0.001), percent(0)
    ('31%', '<1%', '0%')
    """
    return "<1%" if 0 < share < 0.005 else f"{share:.0%}"


def fitted(text: str, columns: int, cut: str = "…") -> str:
    """The text in at most so many columns.

    >>> fitted("generation-0", 6), fitted("short", 6)
    ('gener…', 'short')
    """
    return text if len(text) <= columns else text[: max(columns - len(cut), 0)] + cut[:columns]


def joined(parts: Iterable[Part], columns: int, glyphs: Glyphs) -> Text:
    """Parts with dots between them; those that no longer fit are left out, which is marked.

    >>> from millrace.cluster.view.charts import ASCII
    >>> joined([Part("one"), Part("two"), Part("three")], 13, ASCII).plain
    'one | two | ~'
    """
    line, dot = Text(), f" {glyphs.dot} "
    rest = [part for part in parts if part.text]
    for index, part in enumerate(rest):
        before = dot if line else ""
        after = len(dot) + len(glyphs.cut) if index + 1 < len(rest) else 0
        fits_with_a_mark = line.cell_len + len(before) + len(part.text) + after <= columns
        whole_rest = line.cell_len + sum(len(dot) + len(each.text) for each in rest[index:]) <= columns
        if line and not fits_with_a_mark and not whole_rest:
            return line.append(before + glyphs.cut, "dim")
        line.append(before, "dim").append(part.text, part.style)
    return line


def wrapped(text: str, columns: int) -> list[str]:
    """The text in lines of at most so many columns, broken at spaces where there are any. Its own lines stay.

    >>> wrapped("raised ValueError", 10)
    ['raised', 'ValueError']
    """
    lines: list[str] = []
    for own in text.splitlines() or [""]:
        rest = own.expandtabs(4).rstrip()
        while len(rest) > columns:
            space = rest.rfind(" ", 1, columns + 1)
            end = space if space > 0 and rest[:space].strip() else columns
            lines.append(rest[:end].rstrip())
            rest = rest[end:].lstrip()
        lines.append(rest)
    return lines


def facts_of(event: Mapping[str, Any], hidden: Sequence[str] = HIDDEN) -> str:
    """An event's facts in one line: what is a text alone, the others with their names.

    >>> facts_of({"kind": "failed", "cause": "no memory", "step": 3})
    'no memory, step 3'
    """
    said = []
    for name, value in event.items():
        if name in hidden or value in (None, "", [], {}):
            continue
        if isinstance(value, str) and name in ("cause", "message", "text", "what", "why"):
            said.append(" ".join(value.split()))
        elif isinstance(value, Mapping):
            said.append(f"{name} " + ", ".join(f"{key} {inner}" for key, inner in value.items()))
        elif isinstance(value, list | tuple):
            said.append(", ".join(map(str, value)))
        else:
            said.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {' '.join(str(value).split())}")
    return ", ".join(said)
