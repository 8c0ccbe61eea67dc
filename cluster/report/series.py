"""The series of a chart, as plain numbers, and what many of them are made with."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from millrace.cluster.report.read import Row

POINTS = 400  # of a line at most; more rows are drawn as means of equally many steps
BARS = 60

Numbers = list[float | None]
Fold = Callable[[Sequence[float]], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One line, or one layer of stacked bars."""

    name: str
    colour: str  # a class of page.css: c0..c7 tell apart, s0..s5 are in order
    x: list[float]  # optimiser steps
    y: Numbers
    style: str = "line"  # line | faint | dash | dots


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """One picture."""

    id: str
    title: str
    unit: str  # of the vertical axis, in words
    about: str  # what it shows, in a sentence
    series: list[Series]
    stack: bool = False  # bars on each other instead of lines; a bar covers the steps since the one before
    log: bool = False
    percent: bool = False
    zero: bool = False  # the axis begins at 0

    def as_json(self) -> dict[str, Any]:
        """What the page draws."""
        return asdict(self)


def mean(values: Sequence[float]) -> float:
    """Of at least one value."""
    return sum(values) / len(values)


def buckets(rows: Sequence[Row], most: int) -> list[Sequence[Row]]:
    """Consecutive rows together, so that there are at most so many buckets, all but the last of one size.

    >>> [len(bucket) for bucket in buckets([{}] * 7, 3)]
    [3, 3, 1]
    """
    size = max(1, -(-len(rows) // most))
    return [rows[at : at + size] for at in range(0, len(rows), size)]


def value(rows: Iterable[Row], name: str, fold: Fold = mean) -> float | None:
    """Of the rows that have the column; None if none has."""
    values = [row[name] for row in rows if row.get(name) is not None]
    return fold(values) if values else None


def line(rows: Sequence[Row], name: str, *, said: str, colour: str, style: str = "line") -> Series:
    """A column of metrics.jsonl, step by step."""
    parts = buckets(rows, POINTS)
    return Series(
        name=said, colour=colour, style=style, x=[part[-1]["step"] for part in parts], y=[value(p, name) for p in parts]
    )
