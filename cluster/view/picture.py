"""What one screen shows, put together out of a status, rows of metrics.jsonl and rows of events.jsonl. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from millrace.cluster.gauge import CAUSES, Spent
from millrace.cluster.snapshot import Status
from millrace.cluster.view.charts import BLOCKS, Glyphs, Value

Row = Mapping[str, Any]

RECENT = 20  # steps that a mean, a histogram or a share is taken over


@dataclass(frozen=True)
class Picture:
    """One moment of a run. Nothing in it is recomputed for a second panel."""

    status: Status
    rows: Sequence[Row]
    events: Sequence[Row]
    now_s: float
    recipe: str = ""
    glyphs: Glyphs = BLOCKS

    @cached_property
    def steps(self) -> list[Row]:
        """Rows of optimiser steps."""
        return [row for row in self.rows if "held_out" not in row]

    @cached_property
    def evaluations(self) -> list[Row]:
        """Held-out evaluations in the order of their steps."""
        found = [row["held_out"] for row in self.rows if isinstance(row.get("held_out"), Mapping)]
        return sorted(found, key=lambda each: int(each["step"]))

    @property
    def supervised(self) -> bool:
        """It learns from answers: rows have a loss and no reward."""
        return bool(self.steps) and all("reward/mean" not in row for row in self.steps[-RECENT:])

    @property
    def ended(self) -> bool:
        return self.status.ended

    def curve(self, name: str) -> list[Value]:
        """A column of the steps' rows."""
        return [row.get(name) for row in self.steps]

    def recent(self, name: str) -> Value:
        """Its mean over the last steps."""
        there = [row[name] for row in self.steps[-RECENT:] if row.get(name) is not None]
        return sum(there) / len(there) if there else None

    @cached_property
    def lags(self) -> dict[int, float]:
        """Lag -> share of the tokens trained in the last steps."""
        tokens: dict[int, float] = {}
        for row in self.steps[-RECENT:]:
            for name, value in row.items():
                if name.startswith("lag_") and name.endswith("/tokens") and value:
                    lag = int(name.removeprefix("lag_").removesuffix("/tokens"))
                    tokens[lag] = tokens.get(lag, 0) + value
        total = sum(tokens.values())
        return {lag: tokens[lag] / total for lag in sorted(tokens)}

    @cached_property
    def spent(self) -> dict[str, float]:
        """What the learner's time went on in the last steps -> its share; the largest first."""
        spent = Spent()
        for row in self.steps[-RECENT:]:
            if "time/step_s" in row:
                spent.add(row)
        shares = {WAITING.get(name, name): share for name, share in spent.shares.items() if share >= 0.005}
        return dict(sorted(shares.items(), key=lambda pair: -pair[1]))

    def last(self, kind: str) -> Row | None:
        """The newest event of a kind."""
        return next((event for event in reversed(self.events) if event.get("kind") == kind), None)

    @cached_property
    def stalled(self) -> str:
        """What a run that makes no step any more says of it; "" when a step was made since."""
        event = self.last("stalled")
        if event is None or self.ended or (self.steps and self.steps[-1].get("time_s", 0.0) > event["time_s"]):
            return ""
        return str(event.get("why", "")).strip() or "nobody knows why"


WAITING = {cause: f"wait: {cause}" for cause in CAUSES}
