"""The optimiser steps on an assembled batch, and their numbers. What is not finite makes none."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from millrace.core.errors import TrainingError
from millrace.core.types import Floats, Ints
from millrace.learner.assemble import Microbatch
from millrace.learner.metrics import OFF_POLICY, Mean
from millrace.learner.model import Policy
from millrace.learner.objective import Objective
from millrace.learner.optimiser import GradientRefused, Optimiser
from millrace.learner.report import LagNumbers, StepNumbers

# Importance weights outside this range count as clipped: the range of PPO and GRPO.
CLIP_LOW, CLIP_HIGH = 0.8, 1.2


class Refused(TrainingError):
    """An optimiser step that is not made; the weights stay as they were."""

    def __init__(self, message: str, rule: str = "", places: Sequence[int] = ()) -> None:
        """
        Args:
            rule: "non_finite" for a loss, "gradient" for the gradient of all of them.
            places: in the batch, of the groups that brought it about.
        """
        super().__init__(message)
        self.rule, self.places = rule, tuple(places)


class Interrupted(Exception):
    """The run is to end, and no optimiser step of the batch was made yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """What came of the optimiser steps on one batch."""

    numbers: StepNumbers | None  # None: none was made
    refused: tuple[Refused, ...] = ()  # those that were left out


def make_step(
    policy: Policy,
    objective: Objective,
    optimiser: Optimiser,
    microbatches: Sequence[Microbatch],
    *,
    name: Callable[[Sequence[int]], str],
) -> StepNumbers:
    """Accumulate the gradient of all micro-batches and update the weights.

    Args:
        microbatches: of the whole batch; without any, the gradient is zero and moments and decay go on.
        name: says which step and groups, given places in the batch, for messages.
    Raises:
        TrainingError: a loss or the gradient is not finite; the weights stay as they were.
    """
    return _numbers([_update(policy, objective, optimiser, microbatches, name)], first=1)


def make_steps(
    policy: Policy,
    objective: Objective,
    optimiser: Optimiser,
    updates: Sequence[Sequence[Microbatch]],
    *,
    passes: int,
    name: Callable[[Sequence[int]], str],
    refuse_above: float | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> Steps:
    """Several optimiser steps on one batch; their numbers are means. Those whose loss is not finite are left out.

    How far the sampler is, by lag and over all, is said of the policy before all of them: over the first pass where its
    log-probabilities came with the batch, else over the first step.

    Args:
        updates: the micro-batches of each step, pass after pass.
        passes: how many; each sees the whole batch once.
        name: as in `make_step`.
        refuse_above: a gradient of a larger norm makes no step.
        interrupted: asked between micro-batches until the first step is made.
    Raises:
        Interrupted: it said so.
    """
    known = all("proximal_logprob_N" in micro.scored for microbatches in updates for micro in microbatches)
    measured = len(updates) // passes if known else 1
    made: list[_Update] = []
    refused: list[Refused] = []
    first = 0  # of those made, how many say how far the sampler is
    for at, microbatches in enumerate(updates):
        remembered = objective.memory()
        try:
            ends = interrupted if not made else None
            made.append(_update(policy, objective, optimiser, microbatches, name, refuse_above, ends))
        except Refused as caught:
            objective.restore(remembered)
            refused.append(caught)
            continue
        if at < measured or not first:
            first += 1
    return Steps(numbers=_numbers(made, first=first) if made else None, refused=tuple(refused))


def _numbers(made: Sequence["_Update"], *, first: int) -> StepNumbers:
    """Of all that were made; how far the sampler is, of the first so many."""
    metrics: dict[str, Mean] = {}
    for at, one in enumerate(made):
        for key, mean in one.metrics.items():
            if key in OFF_POLICY and at >= first:
                continue
            metrics[key] = metrics[key] + mean if key in metrics else mean
    gap_N = np.concatenate([np.empty(0, np.float32), *(one.gap_N for one in made[:first])])
    staleness_N = np.concatenate([np.empty(0, np.int32), *(one.staleness_N for one in made[:first])])
    tokens = sum(one.tokens for one in made)
    return StepNumbers(
        loss=float(np.mean([one.loss for one in made])),
        gradient_norm=float(np.mean([one.gradient_norm for one in made])),
        learning_rate=made[-1].learning_rate,
        entropy=sum(one.entropy_sum for one in made) / tokens if tokens else 0.0,
        metrics={key: mean.value for key, mean in metrics.items()},
        by_lag=lag_numbers(gap_N, staleness_N),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Update:
    """What one optimiser step was like, in sums."""

    loss: float
    gradient_norm: float
    learning_rate: float
    entropy_sum: float
    tokens: int
    metrics: Mapping[str, Mean]
    gap_N: Floats  # log of policy over behaviour probability, where the behaviour is known
    staleness_N: Ints


def _update(
    policy: Policy,
    objective: Objective,
    optimiser: Optimiser,
    microbatches: Sequence[Microbatch],
    name: Callable[[Sequence[int]], str],
    refuse_above: float | None = None,
    interrupted: Callable[[], bool] | None = None,
) -> _Update:
    losses: list[torch.Tensor] = []
    gaps: list[torch.Tensor] = []
    entropies: list[torch.Tensor] = []
    metrics: dict[str, Mean] = {}
    for micro in microbatches:
        if interrupted is not None and interrupted():
            optimiser.clear()
            raise Interrupted
        have = policy.words(micro, objective.needs)
        loss = objective(have)
        loss.value.backward()
        losses.append(loss.value.detach())
        if micro.behaviour_logprob_N is not None:
            gaps.append(have["proximal_logprob_N"] - have["behaviour_logprob_N"])
        entropies.append(have["entropy_N"].detach().sum())
        for key, mean in loss.metrics.items():
            metrics[key] = metrics[key] + mean if key in metrics else mean
    values = torch.stack(losses).double().cpu().numpy() if losses else np.zeros(0)
    if not np.isfinite(values).all():
        optimiser.clear()
        bad = np.flatnonzero(~np.isfinite(values)).tolist()
        places = tuple(dict.fromkeys(group for at in bad for group in microbatches[at].groups))
        raise Refused(
            f"the loss is {values[bad[0]]} at {name(places)}; the step was not made."
            " Look at these groups' rewards and log-probabilities, or lower the learning rate",
            "non_finite",
            places,
        )
    learning_rate = optimiser.learning_rate
    every = tuple(dict.fromkeys(group for micro in microbatches for group in micro.groups))
    try:
        norm = optimiser.step(where=lambda: name(every), refuse_above=refuse_above)
    except GradientRefused as caught:
        raise Refused(str(caught), "gradient", every) from None
    behaved = [micro.staleness_N for micro in microbatches if micro.behaviour_logprob_N is not None]
    return _Update(
        loss=float(values.sum()),
        gradient_norm=norm,
        learning_rate=learning_rate,
        entropy_sum=float(torch.stack(entropies).sum()) if entropies else 0.0,
        tokens=sum(len(micro.token_N) for micro in microbatches),
        metrics=metrics,
        gap_N=torch.cat(gaps).float().cpu().numpy() if gaps else np.empty(0, np.float32),
        staleness_N=np.concatenate([np.empty(0, np.int32), *behaved]),
    )


def lag_numbers(gap_N: Floats, staleness_N: Ints) -> dict[int, LagNumbers]:
    """The numbers of each lag.

    Args:
        gap_N: log of policy over behaviour probability, nats.
        staleness_N: lag, versions.

    >>> lag_numbers(np.zeros(3, np.float32), np.array([0, 0, 2]))[0]
    LagNumbers(tokens=2, k3=0.0, max_gap=0.0, effective_sample_size=1.0, clip_fraction=0.0)
    """
    numbers = {}
    for lag in np.unique(staleness_N).tolist():
        gap = gap_N[staleness_N == lag].astype(np.float64)
        weight = np.exp(gap)
        numbers[int(lag)] = LagNumbers(
            tokens=len(gap),
            # expm1 keeps gaps of rounding size, whose k3 is far below one ulp of the weight.
            k3=float((np.expm1(gap) - gap).mean()),
            max_gap=float(np.abs(gap).max()),
            effective_sample_size=float(weight.sum() ** 2 / (len(gap) * (weight**2).sum())),
            clip_fraction=float(((weight < CLIP_LOW) | (weight > CLIP_HIGH)).mean()),
        )
    return numbers
