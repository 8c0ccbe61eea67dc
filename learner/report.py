"""What the learner tells the outside: a report per step, and its status at any time. Data alone: who reads it need not
import what computes it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from millrace.learner.samples import SampledRollout


@dataclass(frozen=True, slots=True, kw_only=True)
class LagNumbers:
    """How the policy differs from the weights that sampled, over the tokens of one lag."""

    tokens: int
    k3: float  # nats per token: mean of (w - 1) - log w, with w = policy / behaviour; an estimate of their divergence
    max_gap: float  # largest |log w|, nats
    effective_sample_size: float  # (sum w)^2 / (n sum w^2), a share of the tokens
    clip_fraction: float  # share of tokens with w outside [0.8, 1.2]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepNumbers:
    """What one optimiser step was like."""

    loss: float
    gradient_norm: float  # before clipping
    learning_rate: float
    entropy: float  # mean over loss tokens, nats
    metrics: Mapping[str, float]  # the objective's own
    by_lag: Mapping[int, LagNumbers]


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


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisedResult:
    """What a supervised run did."""

    directory: str  # of the trained model and its tokenizer
    steps: int
    rows: int  # over all epochs
    tokens: int  # of answers, over all epochs
    first_loss: float  # of the first step, nats per token
    last_loss: float
    seconds: float


def to_plain(report: StepReport) -> dict[str, Any]:
    """As JSON holds it, without its rollouts."""
    return asdict(replace(report, samples=()))


def of_plain(plain: Mapping[str, Any]) -> StepReport:
    """What `to_plain` gave."""
    numbers = dict(plain["numbers"])
    by_lag = {int(lag): LagNumbers(**each) for lag, each in numbers.pop("by_lag").items()}
    return StepReport(**{**plain, "numbers": StepNumbers(by_lag=by_lag, **numbers), "samples": ()})
