"""Curves and bars out of characters. Pure: numbers in, strings of an exact width out."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite

Value = float | None  # None and nan: no value, a gap


@dataclass(frozen=True, slots=True)
class Glyphs:
    """What a terminal can show."""

    levels: str  # of a cell filled from below; the first is empty
    parts: str  # of a cell filled from the left; the first is empty, the last full
    done: str  # of the progress bar
    left: str
    dot: str  # between two facts
    to: str  # between two bounds
    cut: str  # at the end of what did not fit


BLOCKS = Glyphs(levels=" ▁▂▃▄▅▆▇█", parts=" ▏▎▍▌▋▊▉█", done="━", left="─", dot="·", to="–", cut="…")
ASCII = Glyphs(levels=" .:-=+*%#", parts=" #", done="=", left="-", dot="|", to="-", cut="~")


def thinned(values: Sequence[Value], columns: int) -> list[Value]:
    """At most `columns` values: means of equal shares of the sequence; shares without a value are gaps.

    >>> thinned([1, 3, 5, 7], 2), thinned([1, None], 4)
    ([2.0, 6.0], [1, None])
    """
    if len(values) <= columns:
        return list(values)
    edges = [len(values) * column // columns for column in range(columns + 1)]
    return [_mean(values[start:end]) for start, end in pairwise(edges)]


def spread(values: Sequence[Value], columns: int) -> list[Value]:
    """The values over all of the columns: few are repeated, many are thinned.

    >>> spread([1, 2], 5), spread([1, 3, 5, 7], 2), spread([], 3)
    ([1, 1, 1, 2, 2], [2.0, 6.0], [])
    """
    if not 0 < len(values) < columns:
        return thinned(values, columns)
    return [values[column * len(values) // columns] for column in range(columns)]


def bounds(values: Sequence[Value]) -> tuple[float, float] | None:
    """The smallest and the largest value; None where there is none.

    >>> bounds([2.0, None, 1.0]), bounds([None])
    ((1.0, 2.0), None)
    """
    there = [value for value in values if value is not None and isfinite(value)]
    return (min(there), max(there)) if there else None


def plot(
    values: Sequence[Value], columns: int, rows: int, glyphs: Glyphs = BLOCKS, *, floor: float | None = None
) -> list[str]:
    """An area chart from the smallest value, or `floor`, to the largest; the top row first.

    >>> plot([0.0, 0.5, 1.0], columns=3, rows=1), plot([1.0, None, 1.0], columns=3, rows=1)
    (['▁▅█'], ['▅ ▅'])
    """
    points = thinned(values, columns)
    found = bounds(points)
    if found is None:
        return [" " * columns] * rows
    low, high = found if floor is None else (floor, max(found[1], floor))
    deepest = len(glyphs.levels) - 1
    top = rows * deepest
    heights = [_height(point, low, high, top) for point in points]
    lines = []
    for row in reversed(range(rows)):
        cells = (glyphs.levels[min(max(height - row * deepest, 0), deepest)] for height in heights)
        lines.append("".join(cells).ljust(columns))
    return lines


def bar(share: float, columns: int, glyphs: Glyphs = BLOCKS) -> str:
    """A bar of `share` of the columns; what is not nothing is visible.

    >>> bar(0.5, 4), bar(0.001, 4), bar(0, 2)
    ('██  ', '▏   ', '  ')
    """
    deepest = len(glyphs.parts) - 1
    filled = round(min(max(share, 0.0), 1.0) * columns * deepest)
    filled = max(filled, 1) if share > 0 and columns else filled
    whole, rest = divmod(filled, deepest)
    return (glyphs.parts[-1] * whole + (glyphs.parts[rest] if rest else "")).ljust(columns)


def _height(point: Value, low: float, high: float, top: int) -> int:
    """Eighths of rows: 0 for a gap, at least 1 for a value; half way up if all are equal."""
    if point is None or not isfinite(point):
        return 0
    share = (point - low) / (high - low) if high > low else 0.5
    return 1 + round(share * (top - 1))


def _mean(values: Sequence[Value]) -> Value:
    there = [value for value in values if value is not None and isfinite(value)]
    return sum(there) / len(there) if there else None
