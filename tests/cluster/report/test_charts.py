"""The numbers behind the curves, by hand."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from millrace.cluster.report.charts import charts
from millrace.cluster.report.read import Found
from millrace.cluster.report.series import POINTS, Chart, Series

Row = dict[str, Any]


def step_row(step: int, *, lags: Mapping[int, int] | None = None, **changes: Any) -> Row:
    """A row of metrics.jsonl; `lags`: tokens by lag."""
    found: Row = {
        "step": step,
        "reward/mean": step / 100,
        "rollout/mean_length": 5.0,
        "rollout/count": 8,
        "train/loss": -step,
        "train/gradient_norm": 1.0,
        "train/entropy": 0.5,
        "train/tokens": 100,
        "time/wait_s": 1.0,
        "time/compute_s": 2.0,
        "time/publish_s": 0.5,
        "time/checkpoint_s": 0.0,
        "time/other_s": 0.5,
        "time/step_s": 4.0,
    }
    for lag, tokens in (lags or {0: 100}).items():
        found |= {
            f"lag_{lag}/tokens": tokens,
            f"lag_{lag}/max_gap": 0.1 * lag + step,
            f"lag_{lag}/effective_sample_size": 1 - 0.1 * lag,
        }
    return found | changes


def found(rows: list[Row], held_out: list[Row] | None = None) -> Found:
    return Found(
        directory=Path("runs/x"),
        table={},
        config=None,
        rows=list(rows),
        held_out=list(held_out or []),
        events=[],
        status={},
        result={},
        rollouts=[],
    )


def by_id(*args: Any) -> dict[str, Chart]:
    return {chart.id: chart for chart in charts(found(*args))}


def points(chart: Chart) -> dict[str, list[tuple[float, float | None]]]:
    return {each.name: list(zip(each.x, each.y, strict=True)) for each in chart.series}


def test_a_run_has_all_its_charts() -> None:
    books = {"waste/generated": 120, "waste/trained": 100}
    made = charts(found([step_row(1, **books)], [{"step": 0, "mean": 0.1}]))
    assert [chart.id for chart in made] == [
        "reward", "lag", "lag_shares", "throughput", "waste", "time", "entropy", "gap", "ess", "length", "loss",
        "gradient",
    ]  # fmt: skip


def test_a_supervised_run_has_losses_only() -> None:
    rows = [{"step": step, "time_s": 0.0, "train/loss": 1.0, "train/gradient_norm": 1.0} for step in (1, 2)]
    assert list(by_id(rows)) == ["loss", "gradient"]
    assert charts(found([])) == []


def test_rewards_of_steps_and_of_evaluations() -> None:
    chart = by_id([step_row(1), step_row(2)], [{"step": 0, "mean": 0.25}, {"step": 2, "mean": None}])["reward"]
    assert points(chart) == {"training": [(1, 0.01), (2, 0.02)], "held-out": [(0, 0.25), (2, None)]}


def test_a_long_run_is_drawn_as_means_and_says_so() -> None:
    rows = [step_row(step) for step in range(1, 2 * POINTS + 1)]
    chart = by_id(rows)["reward"]
    mean, each = chart.series
    assert (mean.name, each.name, each.style) == ("training, mean of 32 steps", "training, mean of 2 steps", "faint")
    assert len(each.x) == POINTS and each.x[0] == 2 and each.y[0] == pytest.approx(0.015)
    assert mean.y[-1] == pytest.approx(sum(range(2 * POINTS - 31, 2 * POINTS + 1)) / 32 / 100)


def test_lag_is_weighted_by_tokens() -> None:
    chart = by_id([step_row(1), step_row(2, lags={0: 10, 3: 30})])["lag"]
    assert points(chart) == {"largest": [(1, 0), (2, 3)], "mean": [(1, 0.0), (2, 2.25)]}


def test_shares_of_lags_add_up_to_one() -> None:
    chart = by_id([step_row(1), step_row(2, lags={0: 10, 3: 30})])["lag_shares"]
    assert points(chart) == {"lag 0": [(1, 1.0), (2, 0.25)], "lag 3": [(1, 0.0), (2, 0.75)]}
    many = by_id([step_row(1, lags=dict.fromkeys(range(40), 1))])["lag_shares"]
    assert sum(y or 0 for each in many.series for y in each.y) == pytest.approx(1)
    assert [each.colour for each in many.series] == ["s0", "s1", "s2", "s3", "s4", "s5"]


def test_a_step_without_tokens_of_a_lag_says_nothing_of_it() -> None:
    rows = [step_row(1), step_row(2, lags={1: 5}), step_row(3)]
    assert points(by_id(rows)["ess"]) == {"lag 0": [(1, 1.0), (3, 1.0)], "lag 1": [(2, 0.9)]}


def test_gaps_of_many_steps_keep_their_largest() -> None:
    chart = by_id([step_row(step) for step in range(1, 121)])["gap"]
    assert points(chart)["lag 0"][:2] == [(2, 2.0), (4, 4.0)]
    assert "largest of 2 steps" in chart.about


def test_throughput_is_of_whole_looks_at_the_ledger() -> None:
    """Steps 1 and 2 were recorded together, so that the books of both are those after the second."""
    first, second = ({"waste/generated": 260, "waste/trained": 200}, {"waste/generated": 300, "waste/trained": 300})
    rows = [step_row(1, **first), step_row(2, **first), step_row(3, **second)]
    assert points(by_id(rows)["throughput"]) == {
        "generated": [(2, 260 / 8), (3, 40 / 4)],
        "trained": [(2, 200 / 8), (3, 100 / 4)],
    }


def test_without_books_only_what_was_trained_is_known() -> None:
    made = by_id([step_row(1)])
    assert points(made["throughput"]) == {"trained": [(1, 25.0)]}
    assert "waste" not in made


def test_waste_is_what_was_not_trained_as_a_share_of_all() -> None:
    rows = [
        step_row(1, **{"waste/generated": 200, "waste/trained": 100, "waste/in_flight": 100, "waste/masked": 0}),
        step_row(2, **{"waste/generated": 400, "waste/trained": 300, "waste/in_flight": 60, "waste/stale: drop": 40}),
    ]
    assert points(by_id(rows)["waste"]) == {"in flight": [(1, 0.5), (2, 0.15)], "stale: drop": [(1, 0.0), (2, 0.1)]}


def test_the_learners_time_is_all_of_it_and_waiting_has_causes() -> None:
    causes = {"idle/data_s": 0.5, "idle/judge_s": 0.25, "idle/weights_s": 0.0, "idle/scheduler_s": 0.125}
    chart = by_id([step_row(1, **causes), step_row(2, **causes)])["time"]
    assert sum(each.y[0] or 0 for each in chart.series) == pytest.approx(1)
    made = points(chart)
    assert made["waiting for data"] == [(1, 0.125), (2, 0.125)]
    assert made["for verdicts"] == [(1, 0.0625), (2, 0.0625)]
    assert made["other"] == [(1, 0.15625), (2, 0.15625)], "what no cause explains is part of it"
    older = points(by_id([step_row(1)])["time"])
    assert older["waiting"] == [(1, 0.25)] and older["other"] == [(1, 0.125)] and "for verdicts" not in older


def test_colours_of_a_chart_are_told_apart() -> None:
    books = {f"waste/{name}": 1 for name in ("generated", "trained", "masked", "in_flight", "queued", "stale: drop")}
    books |= {f"idle/{cause}_s": 1 for cause in ("data", "judge", "weights", "scheduler")}
    for chart in charts(found([step_row(1, lags={0: 1, 1: 1, 2: 1}, **books)], [{"step": 0, "mean": 0.1}])):
        assert len({each.colour for each in chart.series}) == len(chart.series), chart.id
        assert all(isinstance(each, Series) for each in chart.series)
