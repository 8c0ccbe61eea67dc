"""The curves about age: how old trained tokens were, and what depends on it."""

from collections.abc import Iterable, Sequence
from itertools import pairwise

from millrace.cluster.report.read import Found, Row
from millrace.cluster.report.series import BARS, POINTS, Chart, Fold, Series, buckets, value

LAG_CLASSES = 6  # that colours can tell apart


def _tokens_at(row: Row) -> dict[int, int]:
    """Trained tokens of a step by their lag."""
    names = [name for name in row if name.startswith("lag_") and name.endswith("/tokens")]
    return {int(name.removeprefix("lag_").removesuffix("/tokens")): int(row[name]) for name in names if row[name]}


def lag_classes(lags: Iterable[int]) -> list[tuple[str, list[int]]]:
    """Lags to tell apart by colour: each alone, or, if there are too many, in classes that double in width.

    >>> lag_classes([0, 1, 2])
    [('lag 0', [0]), ('lag 1', [1]), ('lag 2', [2])]
    >>> [name for name, _ in lag_classes(range(20))]
    ['lag 0', 'lag 1', 'lag 2-3', 'lag 4-7', 'lag 8-15', 'lag 16-19']
    """
    present = sorted(set(lags))
    if len(present) <= LAG_CLASSES:
        return [(f"lag {lag}", [lag]) for lag in present]
    edges = [0, 1, *(2**power for power in range(1, LAG_CLASSES - 1)), present[-1] + 1]
    found = []
    for low, high in pairwise(edges):
        inside = [lag for lag in present if low <= lag < high]
        if inside:
            found.append((f"lag {inside[0]}" if len(inside) == 1 else f"lag {inside[0]}-{inside[-1]}", inside))
    return found


def _classes(rows: Sequence[Row]) -> list[tuple[str, list[int]]]:
    return lag_classes(lag for row in rows for lag in _tokens_at(row))


def lag(found: Found) -> Chart | None:
    """Mean and largest lag of each step, and the bound."""
    having = [(row["step"], tokens) for row in found.rows if (tokens := _tokens_at(row))]
    if not having:
        return None
    rows: list[Row] = [
        {
            "step": step,
            "mean": sum(lag * many for lag, many in tokens.items()) / sum(tokens.values()),
            "max": max(tokens),
        }
        for step, tokens in having
    ]
    parts = buckets(rows, POINTS)
    x = [part[-1]["step"] for part in parts]
    series = [
        Series(name="largest", colour="c1", x=x, y=[value(part, "max", max) for part in parts]),
        Series(name="mean", colour="c0", x=x, y=[value(part, "mean") for part in parts]),
    ]
    if found.config is not None:
        ends = [x[0], x[-1]]
        allowed = float(found.config.loop.max_lag)
        series.append(Series(name="max_lag", colour="c7", style="dash", x=ends, y=[allowed, allowed]))
    return Chart(
        id="lag",
        title="Lag",
        unit="versions",
        about="How many versions older than the policy the weights were that sampled a trained token.",
        series=series,
        zero=True,
    )


def lag_shares(rows: Sequence[Row]) -> Chart | None:
    """How the trained tokens are spread over the lags."""
    having = [row for row in rows if _tokens_at(row)]
    if not having:
        return None
    parts = [[_tokens_at(row) for row in part] for part in buckets(having, BARS)]
    x = [part[-1]["step"] for part in buckets(having, BARS)]
    totals = [sum(sum(tokens.values()) for tokens in part) for part in parts]
    series = [
        Series(
            name=name,
            colour=f"s{at}",
            x=x,
            y=[
                sum(tokens.get(lag, 0) for tokens in part for lag in lags) / total
                for part, total in zip(parts, totals, strict=True)
            ],
        )
        for at, (name, lags) in enumerate(_classes(having))
    ]
    return Chart(
        id="lag_shares",
        title="Trained tokens by lag",
        unit="share",
        about="Of the tokens in the loss, how many were how old.",
        series=series,
        stack=True,
        percent=True,
        zero=True,
    )


def _of_lags(rows: Sequence[Row], lags: Sequence[int], number: str) -> list[float]:
    values = (row.get(f"lag_{lag}/{number}") for row in rows for lag in lags)
    return [value for value in values if value is not None]


def by_lag(
    rows: Sequence[Row],
    *,
    id: str,
    title: str,
    unit: str,
    about: str,
    number: str,
    fold: Fold,
    said: str,
    log: bool = False,
    percent: bool = False,
) -> Chart | None:
    """A number of metrics.jsonl that each lag has of its own, as a line per lag.

    Args:
        number: of the columns lag_0/number, lag_1/number, ...
        fold: of the values of several steps, or lags, that are drawn as one point; `said` names it.
    """
    having = [row for row in rows if _tokens_at(row)]
    if not having:
        return None
    series = []
    for at, (name, lags) in enumerate(_classes(having)):
        # A step without tokens of a lag says nothing of it: the line goes on to the next that has some.
        found = [(part[-1]["step"], _of_lags(part, lags, number)) for part in buckets(having, BARS)]
        known = [(step, values) for step, values in found if values]
        series.append(
            Series(
                name=name,
                colour=f"s{at}",
                x=[step for step, _ in known],
                y=[fold(values) for _, values in known],
            )
        )
    each = -(-len(having) // BARS)
    about += f" Each point is the {said} of {each} steps." if each > 1 else ""
    return Chart(id=id, title=title, unit=unit, about=about, series=series, log=log, percent=percent)
