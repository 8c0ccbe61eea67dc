"""What the learner tells the outside: a report per step, and its status at any time."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from millrace.learner.assemble import Assembled
from millrace.learner.batches import Batch
from millrace.learner.phases import Phases, idle
from millrace.learner.samples import SampledRollout, pick
from millrace.learner.step import LagNumbers, StepNumbers


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One step, for the logs. Durations are wall-clock seconds and add up to `step_s`."""

    step: int  # optimiser steps made, this one among them
    version: int  # published after it
    numbers: StepNumbers
    groups: int
    rollouts: int
    reward: float  # mean over valid rollouts
    reward_std: float
    length: float  # mean response length, tokens
    tokens: int  # in the loss
    masked_tokens: int
    invalid_rollouts: int
    skipped_groups: int
    filtered: Mapping[str, int]  # groups that shapers and filters left out of it, by rule
    rows: int
    unpacked_rows: int  # the same if every response carried its own prompt
    padding_share: float  # of the rows that attention works on
    wait_s: float
    compute_s: float
    publish_s: float
    checkpoint_s: float
    other_s: float
    step_s: float
    idle_s: Mapping[str, float] = field(default_factory=dict)  # wait_s by cause: data, judge, weights, scheduler
    weights: str = ""  # digest of those that were published after it
    samples: tuple[SampledRollout, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerStatus:
    """What the learner does right now."""

    phase: str  # loading | waiting | computing | publishing | committing | stopped
    phase_s: float
    step: int
    version: int


def report_of(
    batch: Batch,
    assembled: Assembled,
    numbers: StepNumbers,
    phases: Phases,
    *,
    step: int,
    version: int,
    weights: str,
    samples: int,
) -> StepReport:
    """The report of a step that was made.

    Args:
        phases: what its time went on.
        step: optimiser steps made, this one among them.
        version: published after it.
        weights: digest of these.
        samples: rollouts that it shows, at most.
    """
    spent, step_s = phases.spent, phases.step_s
    groups = [each.group for each in batch.groups]
    return StepReport(
        step=step,
        version=version,
        numbers=numbers,
        groups=len(groups),
        rollouts=sum(len(group.rollouts) for group in groups),
        reward=assembled.reward,
        reward_std=assembled.reward_std,
        length=assembled.length,
        tokens=assembled.tokens,
        masked_tokens=assembled.masked_tokens,
        invalid_rollouts=assembled.invalid,
        skipped_groups=assembled.skipped_groups,
        filtered=batch.filtered,
        rows=assembled.rows,
        unpacked_rows=assembled.unpacked_rows,
        padding_share=assembled.padding_share,
        wait_s=spent["waiting"],
        compute_s=spent["computing"],
        publish_s=spent["publishing"],
        checkpoint_s=spent["committing"],
        other_s=step_s - sum(spent.values()),
        step_s=step_s,
        idle_s=idle(spent["waiting"], batch.taken.idle_s),
        weights=weights,
        samples=pick(
            groups,
            batch.taken.verdicts,
            [each.reward_G for each in batch.groups],
            batch.taken.lag,
            step=step,
            limit=samples,
            advantages=assembled.advantages,
        ),
    )


def to_plain(report: StepReport) -> dict[str, Any]:
    """As JSON holds it, without its rollouts."""
    return asdict(replace(report, samples=()))


def of_plain(plain: Mapping[str, Any]) -> StepReport:
    """What `to_plain` gave."""
    numbers = dict(plain["numbers"])
    by_lag = {int(lag): LagNumbers(**each) for lag, each in numbers.pop("by_lag").items()}
    return StepReport(**{**plain, "numbers": StepNumbers(by_lag=by_lag, **numbers), "samples": ()})
