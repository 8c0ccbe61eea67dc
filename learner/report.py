"""What the learner tells the outside: a report per step, and its status at any time."""

from collections.abc import Mapping
from dataclasses import dataclass

from millrace.learner.samples import SampledRollout
from millrace.learner.step import StepNumbers


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
    samples: tuple[SampledRollout, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerStatus:
    """What the learner does right now."""

    phase: str  # loading | waiting | computing | publishing | committing | stopped
    phase_s: float
    step: int
    version: int
