"""Whether a run trains long answers as often as it generates them: a rule that prefers short ones is biased."""

import json
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

DECILES = 10


def trained_by_length(ledger: Path, *, steps: int) -> list[dict[str, float]]:
    """Share of the generated rollouts that were trained, by decile of their length.

    Args:
        ledger: the run's ledger.jsonl.
        steps: in the surviving history.
    Returns:
        A row per decile with `longest` (tokens), `generated` (rollouts) and `trained` (share of them); deciles that
        hold no rollout, because many are equally long, are left out.
    """
    with ledger.open("rb") as lines:
        lengths, trained = _rollouts(map(json.loads, lines), steps=steps)
    if not lengths:
        return []
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, DECILES + 1), method="inverted_cdf"))
    bounds = [(-1.0, edges[0]), *pairwise(edges)] if len(edges) > 1 else [(-1.0, edges[0])]
    of = np.array(lengths)
    was = np.array(trained, np.float64)
    rows = []
    for low, high in bounds:
        here = (of > low) & (of <= high)
        if here.any():
            rows.append({"longest": int(high), "generated": int(here.sum()), "trained": float(was[here].mean())})
    return rows


def _rollouts(records: Iterable[Mapping[str, Any]], *, steps: int) -> tuple[list[int], list[bool]]:
    """The length of every generated rollout, and whether it was trained, however often."""
    committed = 0
    lengths: dict[tuple[int, int], list[int]] = {}
    first: dict[tuple[int, int], int] = {}  # group -> the step of its first use
    for record in records:
        rows = record.get("rows", ())
        if record["op"] == "generated":
            for index, attempt, _tokens, rollouts, _location in rows:
                lengths[index, attempt] = [sum(end - start for _, start, end in runs) for runs in rollouts]
        elif record["op"] == "took":
            for row in rows:
                first.setdefault((row[0], row[1]), record["step"])
        elif record["op"] in ("lost", "filtered"):
            ends = record.get("step", committed)  # earlier uses stand: those before this step, or before the commit
            for row in rows:
                if first.get((row[0], row[1]), ends) >= ends:
                    first.pop((row[0], row[1]), None)
        elif record["op"] in ("committed", "reverted"):
            committed = record["step"]
    each = [(length, first.get(group, steps) < steps) for group, own in lengths.items() for length in own]
    return [length for length, _ in each], [was for _, was in each]
