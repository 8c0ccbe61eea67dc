"""The slots of a recipe -> a loss.

    loss = sum_N weight_N * (product of corrections x surrogate(ratio, advantage) + sum of penalties)

weight_N is the aggregation's, made once for the whole batch, so that the losses of its micro-batches add up to
the batch's, however it is cut.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from millrace.core import catalogue, words
from millrace.core.catalogue import Method
from millrace.core.errors import ConfigError, RecipeError, TrainingError, boundary
from millrace.core.recipe import ObjectiveConfig
from millrace.core.references import is_reference
from millrace.core.types import Floats, Ints
from millrace.learner.sequences import Sequences

FOLDERS = {
    "objective": "millrace.learner.objectives",
    "advantage": "millrace.learner.advantages",
    "ratio": "millrace.learner.ratios",
    "surrogate": "millrace.learner.surrogates",
    "correction": "millrace.learner.corrections",
    "penalty": "millrace.learner.penalties",
    "aggregation": "millrace.learner.aggregations",
}
LARGEST_LOG_WEIGHT = 20.0  # of an importance weight in the metrics, nats: their squares stay finite in float32


@dataclass(frozen=True, slots=True)
class Mean:
    """A weighted mean that can be merged.

    >>> (Mean(1.0, 1.0) + Mean(6.0, 2.0)).value
    2.3333333333333335
    """

    total: float
    weight: float

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.weight + other.weight)

    @property
    def value(self) -> float:
        """total / weight; 0 where nothing was weighed."""
        return self.total / self.weight if self.weight else 0.0


@dataclass(frozen=True, slots=True)
class Loss:
    """What a micro-batch adds to the batch's loss."""

    value: torch.Tensor  # scalar: sum over its tokens of weight_N * loss_N
    metrics: Mapping[str, Mean]  # over its tokens; merge by adding


@dataclass(frozen=True, slots=True)
class Objective:
    """A loss, composed of a recipe's methods. Make one with `Objective.of`."""

    loss: Method | None  # a whole loss; the policy gradient's slots are then empty
    advantage: Method | None
    ratio: Method | None
    surrogate: Method | None
    corrections: tuple[Method, ...]
    penalties: tuple[Method, ...]
    aggregation: Method
    zero_advantage_is_zero_loss: bool  # skipping a group whose advantages are all 0 changes no gradient

    @classmethod
    def of(cls, recipe: Mapping[str, Any] | ObjectiveConfig, *, models: frozenset[str] = frozenset()) -> "Objective":
        """Compose the `objective` of a recipe.

        Args:
            recipe: its table, or the typed form.
            models: those that the run has beside the policy, as `{"reference"}`.

        Raises:
            RecipeError: a name, a setting or a word that does not exist, or a model that the run lacks.
        """
        config = recipe if isinstance(recipe, ObjectiveConfig) else _parsed(recipe)
        policy_gradient = config.loss is None
        slots = {slot: _method(slot, getattr(config, slot)) for slot in ("advantage", "ratio", "surrogate")}
        surrogate_name, _ = catalogue.split(config.surrogate, slot="surrogate")
        objective = cls(
            loss=None if config.loss is None else _method("objective", config.loss),
            advantage=slots["advantage"] if policy_gradient else None,
            ratio=slots["ratio"] if policy_gradient else None,
            surrogate=slots["surrogate"] if policy_gradient else None,
            corrections=tuple(_method("correction", spec) for spec in config.corrections),
            penalties=tuple(_method("penalty", spec) for spec in config.penalties),
            aggregation=_method("aggregation", config.aggregation),
            # Every surrogate of the catalogue is 0, with gradient 0, at advantage 0; of a private one nobody knows.
            zero_advantage_is_zero_loss=policy_gradient and not config.penalties and not is_reference(surrogate_name),
        )
        for word, model in words.NEEDS_MODEL.items():
            if word in objective.asks and model not in models:
                raise RecipeError(
                    f'this recipe\'s objective asks for {word}: give the run a {model} model, {model} = "path"'
                )
        return objective

    @property
    def methods(self) -> Mapping[str, Method]:
        """All of its methods by slot; where a slot holds several, `corrections.0`, `corrections.1`, ..."""
        return dict(self._methods())

    @property
    def asks(self) -> frozenset[str]:
        """Every token word that some method of it asks for."""
        per_token = [m for slot, m in self._methods() if slot not in ("advantage", "aggregation")]
        return frozenset[str]().union(*(method.words for method in per_token))

    @property
    def needs(self) -> frozenset[str]:
        """The words that a forward pass must supply. The proximal policy is the policy's own, detached."""
        asks = self.asks | ({"logprob_N"} if "proximal_logprob_N" in self.asks else frozenset())
        return asks & words.FROM_MODEL

    @property
    def learns_from_rewards(self) -> bool:
        """Whether it asks for advantages; a supervised loss does not."""
        return self.advantage is not None

    def advantages(self, have: Mapping[str, Any]) -> Floats:
        """The advantages of one group.

        Args:
            have: `reward_G`, `length_G`, ... of its validly judged members; none gives none.
        Returns:
            advantage_G, float32.

        Raises:
            TrainingError: the estimator fails, or returns another shape or what is not finite.
        """
        size = len(have["reward_G"])
        if self.advantage is None:
            raise RecipeError("a supervised objective has no advantages: its data is not judged")
        if size == 0:
            return np.empty(0, np.float32)
        with boundary(self.advantage.name, TrainingError):
            advantage_G = np.asarray(self.advantage.call(have), np.float32)
        if advantage_G.shape != (size,) or not np.isfinite(advantage_G).all():
            rewards = np.asarray(have["reward_G"]).tolist()
            raise TrainingError(
                f"{self.advantage.name} made {advantage_G.tolist()} of the rewards {rewards}: it must return {size}"
                " finite numbers"
            )
        return advantage_G

    def token_weights(self, sequences: Sequences, *, group_S: Ints) -> Floats:
        """The weight of every loss token, for the WHOLE batch: skipped groups and all micro-batches included.

        Args:
            sequences: of the batch.
            group_S: index of each sequence's group.
        Returns:
            weight_N, float32.
        """
        with boundary(self.aggregation.name, TrainingError):
            weight_N = np.asarray(self.aggregation.call({"sequences": sequences, "group_S": group_S}), np.float32)
        if weight_N.shape != (sequences.total,) or not np.isfinite(weight_N).all():
            raise TrainingError(
                f"{self.aggregation.name} must return {sequences.total} finite weights, got shape {weight_N.shape}"
            )
        return weight_N

    def __call__(self, have: Mapping[str, Any]) -> Loss:
        """The loss of a micro-batch of whole sequences.

        Args:
            have: the words `needs`, `weight_N`, `sequences`, and of the data `advantage_N`, `behaviour_logprob_N`, ...

        Raises:
            TrainingError: a method fails or returns another shape than [N].
        """
        logprob_N: torch.Tensor = have["logprob_N"]
        have = {"proximal_logprob_N": logprob_N.detach(), **have}
        parts: dict[str, torch.Tensor] = {}
        if self.loss is not None:
            loss_N = _tokens(self.loss, have)
        else:
            assert self.ratio is not None and self.surrogate is not None
            have["ratio_N"] = parts["ratio"] = _tokens(self.ratio, have)
            loss_N = _tokens(self.surrogate, have)
            parts.update(_clipped(loss_N, have["ratio_N"], have["advantage_N"]))
        for correction in self.corrections:
            parts[correction.name] = _tokens(correction, have)
            loss_N = loss_N * parts[correction.name]
        for penalty in self.penalties:
            parts[penalty.name] = _tokens(penalty, have)
            loss_N = loss_N + parts[penalty.name]
        parts.update(_off_policy(have))
        if self.loss is not None:
            parts[self.loss.name] = loss_N
        return Loss((have["weight_N"] * loss_N).sum(), _metrics(parts))

    def memory(self) -> dict[str, dict[str, Any]]:
        """What its methods remember, by slot, for the checkpoint."""
        remembered = {slot: catalogue.memory(method) for slot, method in self._methods()}
        return {slot: saved for slot, saved in remembered.items() if saved}

    def restore(self, saved: Mapping[str, Mapping[str, Any]]) -> None:
        """Give its methods their memories back.

        Raises:
            RecipeError: they are another recipe's.
        """
        for slot, method in self._methods():
            catalogue.restore(method, saved.get(slot, {}))

    def __str__(self) -> str:
        """The formula, with its numbers."""
        if self.loss is not None:
            inner = _shown(self.loss)
        else:
            assert self.surrogate is not None and self.ratio is not None and self.advantage is not None
            factors = [*map(_shown, self.corrections), _shown(self.surrogate)]
            inner = f"{' x '.join(factors)} of {_shown(self.ratio)} and {_shown(self.advantage)}"
        return f"{_shown(self.aggregation)} of [{' + '.join([inner, *map(_shown, self.penalties)])}]"

    def _methods(self) -> Iterator[tuple[str, Method]]:
        for slot in ("loss", "advantage", "ratio", "surrogate", "aggregation"):
            method = getattr(self, slot)
            if method is not None:
                yield slot, method
        for slot in ("corrections", "penalties"):
            yield from ((f"{slot}.{place}", method) for place, method in enumerate(getattr(self, slot)))


def _parsed(recipe: Mapping[str, Any]) -> ObjectiveConfig:
    try:
        return ObjectiveConfig.parse(recipe, source="objective")
    except RecipeError:
        raise
    except ConfigError as caught:
        raise RecipeError(str(caught)) from None


def _method(slot: str, spec: catalogue.Spec) -> Method:
    method = catalogue.resolve(spec, folder=FOLDERS[slot], words=words.SLOTS[slot], slot=slot)
    if method.is_async:
        raise RecipeError(f"{slot} {method.name} is an async function: only verifiers may be")
    return method


def _tokens(method: Method, have: Mapping[str, Any]) -> torch.Tensor:
    with boundary(method.name, TrainingError):
        x_N = method.call(have)
    shape = have["logprob_N"].shape
    if not isinstance(x_N, torch.Tensor) or x_N.shape != shape:
        got = f"shape {list(x_N.shape)}" if isinstance(x_N, torch.Tensor) else type(x_N).__name__
        raise TrainingError(f"{method.name} must return one number per token, shape {list(shape)}, got {got}")
    return x_N


def _clipped(loss_N: torch.Tensor, ratio_N: torch.Tensor, advantage_N: torch.Tensor) -> dict[str, torch.Tensor]:
    """1 where a token has an advantage (`moved`) but no gradient through its ratio (`clipped`).

    Empty where nothing can be said: without gradients, and for a surrogate that does not differentiate the ratio.
    """
    if not (ratio_N.requires_grad and loss_N.requires_grad):
        return {}
    (slope_N,) = torch.autograd.grad(loss_N.sum(), ratio_N, retain_graph=True, allow_unused=True)
    if slope_N is None:
        return {}
    moved_N = (advantage_N != 0).to(ratio_N.dtype)
    return {"clipped": moved_N * (slope_N == 0), "moved": moved_N}


def _off_policy(have: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """How far the policy as the step began is from the one that sampled."""
    parts = {"entropy": have["entropy_N"]} if "entropy_N" in have else {}
    if "behaviour_logprob_N" not in have:
        return parts
    with torch.no_grad():
        log_weight_N = have["proximal_logprob_N"] - have["behaviour_logprob_N"]
        log_weight_N = log_weight_N.clamp(-LARGEST_LOG_WEIGHT, LARGEST_LOG_WEIGHT)
        weight_N = log_weight_N.exp()
        parts["importance"] = weight_N
        parts["importance_squared"] = weight_N.square()  # effective sample size: mean(w)^2 / mean(w^2)
        parts["behaviour_kl"] = weight_N - 1 - log_weight_N  # k3 estimate of KL(behaviour || proximal), nats
    return parts


def _metrics(parts: Mapping[str, torch.Tensor]) -> dict[str, Mean]:
    """Means over tokens, with one transfer from the device for all."""
    if not parts:
        return {}
    tokens = len(next(iter(parts.values())))
    with torch.no_grad():
        totals = torch.stack([x_N.sum(dtype=torch.float64) for x_N in parts.values()]).tolist()
    sums = dict(zip(parts, totals, strict=True))
    moved = sums.pop("moved", 0.0)
    return {name: Mean(total, moved if name == "clipped" else float(tokens)) for name, total in sums.items()}


def _shown(method: Method) -> str:
    settings = ", ".join(f"{key}={value}" for key, value in method.settings.items())
    return f"{method.name.rpartition('.')[2]}({settings})" if settings else method.name.rpartition(".")[2]
