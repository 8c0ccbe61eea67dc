"""The report of a step, from what the step was made of."""

from millrace.learner.assemble import Assembled
from millrace.learner.batches import Batch
from millrace.learner.phases import Phases, idle
from millrace.learner.report import StepNumbers, StepReport
from millrace.learner.samples import pick


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
