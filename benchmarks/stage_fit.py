"""Lines through the times of engine and learner steps."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.replay_loop import StageTimes
from millrace.learner.report import StepReport


@dataclass(frozen=True, slots=True)
class Step:
    """One of an engine."""

    sequences: int
    prefilled: int  # tokens read beyond one for each sequence
    seconds: float


def line(rows: Sequence[Sequence[float]], values: Sequence[float]) -> NDArray[np.float64]:
    """Least squares of value = coefficients . row, relative errors counting alike; no coefficient is negative.

    >>> line([[1, 1], [1, 2], [1, 4]], [3.0, 5.0, 9.0]).round(6).tolist()
    [1.0, 2.0]
    """
    matrix, right = np.asarray(rows, float), np.asarray(values, float)
    kept = list(range(matrix.shape[1]))
    found = np.zeros(matrix.shape[1])
    while kept:
        own = np.linalg.lstsq(matrix[:, kept] / right[:, None], np.ones(len(right)), rcond=None)[0]
        if (own >= 0).all():
            found[kept] = own
            break
        kept.pop(int(own.argmin()))
    return found


def scaled(rows: Sequence[Sequence[float]], values: Sequence[float]) -> NDArray[np.float64]:
    """The line, scaled so that what it says adds up to what was measured."""
    found = line(rows, values)
    scale: float = float(np.sum(values)) / float((np.asarray(rows, float) @ found).sum())
    return found * scale


def knots(sequences: Sequence[int]) -> list[int]:
    """Powers of two that some of these lie beside, and the largest of these.

    >>> knots([1, 3, 40, 48])
    [1, 2, 4, 32, 48]
    """
    most = max(sequences)
    powers = [power for exponent in range(20) if (power := 1 << exponent) < most]
    ends = [*powers, most]
    near = {end for many in set(sequences) for end in _beside(many, ends)}
    return sorted(near)


def _beside(many: int, ends: Sequence[int]) -> tuple[int, int]:
    at = bisect_left(ends, many)
    return (many, many) if ends[at] == many else (ends[at - 1], ends[at])


def hats(many: int, ends: Sequence[int]) -> list[float]:
    """How much each knot counts at this number: 1 at its own, falling to 0 at its neighbours.

    >>> hats(3, [1, 2, 4])
    [0.0, 0.5, 0.5]
    """
    return [float(np.interp(many, ends, np.eye(len(ends))[number])) for number in range(len(ends))]


def fitted(
    steps: Sequence[Step], pauses: Sequence[float], reports: Sequence[StepReport], judge_s: float
) -> tuple[StageTimes, dict[str, Any]]:
    """The times, and how well lines describe them."""
    steps = [step for step in steps if step.sequences]
    ends = knots([step.sequences for step in steps])
    rows = [(*hats(step.sequences, ends), step.prefilled) for step in steps]
    seconds = [step.seconds for step in steps]
    *decode_s, prefill_s = scaled(rows, seconds).tolist()
    learner_rows = [(1, report.tokens + report.masked_tokens) for report in reports]
    learner_s = [report.compute_s for report in reports]
    learner_step_s, token_s = scaled(learner_rows, learner_s).tolist()
    times = StageTimes(
        decode_s=tuple(zip(ends, decode_s, strict=True)),
        prefill_s=prefill_s,
        judge_s=judge_s,
        learner_step_s=learner_step_s,
        token_s=token_s,
        publish_s=float(np.median([report.publish_s for report in reports])),
        load_s=float(np.median(pauses)),
    )
    facts = {
        "engine_off": _off(rows, [*decode_s, prefill_s], seconds),
        "learner_off": _off(learner_rows, [learner_step_s, token_s], learner_s),
        "engine_tokens_per_s": round(sum(step.sequences for step in steps) / sum(seconds)),
        "learner_tokens_per_s": round(sum(tokens for _, tokens in learner_rows) / sum(learner_s)),
        "engine_steps": len(steps),
        "learner_steps": len(reports),
    }
    return times, facts


def _off(rows: Sequence[Sequence[float]], line_: Sequence[float], measured: Sequence[float]) -> float:
    """Median relative error of a line."""
    return round(float(np.median(np.abs(np.asarray(rows, float) @ line_ / np.asarray(measured) - 1))), 3)
