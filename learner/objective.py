"""The slots of a recipe -> a loss.

    loss = sum_N weight_N * (product of corrections x surrogate(ratio, advantage) + sum of penalties)

weight_N is the aggregation's, made once for the batch of an optimiser step, so that the losses of its micro-batches
add up to the batch's, however it is cut.
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
from millrace.core.types import Bools, Floats, Ints
from millrace.learner.metrics import Mean, clipped, means, off_policy
from millrace.learner.sequences import Sequences

FOLDERS = {
    "objective": "millrace.learner.objectives",
    "selection": "millrace.learner.selections",
    "advantage": "millrace.learner.advantages",
    "normaliser": "millrace.learner.normalisers",
    "proximal": "millrace.learner.proximals",
    "ratio": "millrace.learner.ratios",
    "surrogate": "millrace.learner.surrogates",
    "correction": "millrace.learner.corrections",
    "penalty": "millrace.learner.penalties",
    "aggregation": "millrace.learner.aggregations",
    "reference": "millrace.learner.references",
}
OPTIONAL = ("selection", "normaliser", "proximal")


@dataclass(frozen=True, slots=True)
class Loss:
    """What a micro-batch adds to the batch's loss."""

    value: torch.Tensor  # scalar: sum over its tokens of weight_N * loss_N
    metrics: Mapping[str, Mean]  # over its tokens; merge by adding


@dataclass(frozen=True, slots=True)
class Objective:
    """A loss, composed of a recipe's methods. Make one with `Objective.of`."""

    loss: Method | None  # a whole loss; the policy gradient's slots are then empty
    selection: Method | None  # None: every rollout of a group is learnt from
    advantage: Method | None
    normaliser: Method | None
    proximal: Method | None  # None: computed
    ratio: Method | None
    surrogate: Method | None
    corrections: tuple[Method, ...]
    penalties: tuple[Method, ...]
    aggregation: Method
    reference: Method
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
        given = {slot: _method(slot, spec) for slot in OPTIONAL if (spec := getattr(config, slot)) is not None}
        surrogate_name, _ = catalogue.split(config.surrogate, slot="surrogate")
        objective = cls(
            loss=None if config.loss is None else _method("objective", config.loss),
            selection=given.get("selection"),
            advantage=slots["advantage"] if policy_gradient else None,
            normaliser=given.get("normaliser"),
            proximal=given.get("proximal"),
            ratio=slots["ratio"] if policy_gradient else None,
            surrogate=slots["surrogate"] if policy_gradient else None,
            corrections=tuple(_method("correction", spec) for spec in config.corrections),
            penalties=tuple(_method("penalty", spec) for spec in config.penalties),
            aggregation=_method("aggregation", config.aggregation),
            reference=_method("reference", config.reference),
            # Every surrogate of the catalogue is 0, with gradient 0, at advantage 0; of a private one nobody knows.
            zero_advantage_is_zero_loss=policy_gradient and not config.penalties and not is_reference(surrogate_name),
        )
        for word, model in words.NEEDS_MODEL.items():
            if word in objective.asks | objective.asks_of_groups and model not in models:
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
        others = ("selection", "advantage", "normaliser", "aggregation", "reference")
        per_token = [m for slot, m in self._methods() if slot not in others]
        return frozenset[str]().union(*(method.words for method in per_token))

    @property
    def asks_of_groups(self) -> frozenset[str]:
        """Every word of a group that its selection or advantage asks for."""
        return frozenset[str]().union(*(m.words for m in (self.selection, self.advantage) if m is not None))

    @property
    def needs(self) -> frozenset[str]:
        """The words that the forward pass of an optimiser step must supply."""
        return self.asks & words.FROM_MODEL

    @property
    def scores_before(self) -> frozenset[str]:
        """The words that a forward pass before the first of several optimiser steps on a batch must supply."""
        computed = self.asks & words.SCORED
        return computed - {"proximal_logprob_N"} if self.proximal is not None else computed

    @property
    def keeps_groups_whole(self) -> bool:
        """Whether a micro-batch must hold all rollouts of a group or none."""
        return "group_S" in self.asks

    @property
    def learns_from_rewards(self) -> bool:
        """Whether it needs judged groups; a supervised loss does not."""
        return self.advantage is not None or self.selection is not None or "reward_S" in self.asks

    def keep(self, have: Mapping[str, Any]) -> Bools:
        """Which rollouts of a group are learnt from.

        Args:
            have: the GROUP words of its validly judged members that `asks_of_groups` names.
        Returns:
            keep_G.

        Raises:
            TrainingError: the selection fails, or returns anything but one truth value per rollout.
        """
        size = len(have["reward_G"])
        if self.selection is None or size == 0:
            return np.ones(size, np.bool_)
        with boundary(self.selection.name, TrainingError):
            keep_G = np.asarray(self.selection.call(have))
        if keep_G.shape != (size,) or keep_G.dtype != np.bool_:
            raise TrainingError(
                f"{self.selection.name} returned {keep_G.tolist()}: it must return {size} truth values, one per rollout"
            )
        return keep_G

    def advantages(self, have: Mapping[str, Any], *, again: bool = False) -> Floats:
        """The advantages of one group; 0 for a whole loss, which has none.

        Args:
            have: the GROUP words of its validly judged members that `asks_of_groups` names.
            again: a further use of the group, of which an estimator with memory remembers nothing more.
        Returns:
            advantage_N, float32, of all response tokens of the group, end to end.

        Raises:
            TrainingError: the estimator fails, or returns another shape or what is not finite.
        """
        sequences: Sequences = have["sequences"]
        if self.advantage is None or len(sequences) == 0:
            return np.zeros(sequences.total, np.float32)
        remembered = catalogue.memory(self.advantage)
        with boundary(self.advantage.name, TrainingError):
            advantage = np.asarray(self.advantage.call(have), np.float32)
        if again:
            catalogue.restore(self.advantage, remembered)
        if advantage.shape not in ((len(sequences),), (sequences.total,)) or not np.isfinite(advantage).all():
            rewards = np.asarray(have["reward_G"]).tolist()
            raise TrainingError(
                f"{self.advantage.name} made {_short(advantage)} of the rewards {rewards}: it must return"
                f" {len(sequences)} finite numbers, one per rollout, or {sequences.total}, one per token"
            )
        return advantage if len(advantage) == sequences.total else sequences.spread(advantage)

    def normalised(self, advantage_N: Floats, sequences: Sequences, *, group_S: Ints) -> Floats:
        """The advantages of a whole batch on the recipe's scale.

        Args:
            advantage_N: of its loss tokens.
            sequences, group_S: of the batch.

        Raises:
            TrainingError: the normaliser fails, or returns another shape or what is not finite.
        """
        if self.normaliser is None or not len(advantage_N):
            return advantage_N
        have = {"advantage_N": advantage_N, "sequences": sequences, "group_S": group_S}
        with boundary(self.normaliser.name, TrainingError):
            scaled_N = np.asarray(self.normaliser.call(have), np.float32)
        if scaled_N.shape != advantage_N.shape or not np.isfinite(scaled_N).all():
            raise TrainingError(
                f"{self.normaliser.name} must return {len(advantage_N)} finite numbers, got {_short(scaled_N)}"
            )
        return scaled_N

    def reference_share(self, step: int) -> float:
        """How far the reference moves towards the policy after optimiser step `step`, counted from 1."""
        with boundary(self.reference.name, TrainingError):
            share = float(self.reference.call({"step": step}))
        if not 0 <= share <= 1:
            raise TrainingError(f"{self.reference.name} returned {share} at step {step}: a share lies in [0, 1]")
        return share

    @property
    def moves_reference(self) -> bool:
        """Whether the reference ever leaves the model it began as."""
        return self.reference.name != "references.frozen"

    def token_weights(self, sequences: Sequences, *, group_S: Ints) -> Floats:
        """The weight of every loss token of an optimiser step, skipped groups and all micro-batches included.

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
        measured = off_policy(have)  # by the computed policy, whatever the recipe takes in its place
        if self.proximal is not None:
            have["proximal_logprob_N"] = _tokens(self.proximal, {**have, "logprob_N": logprob_N.detach()}).detach()
        parts: dict[str, torch.Tensor] = {}
        if self.loss is not None:
            loss_N = _tokens(self.loss, have)
        else:
            assert self.ratio is not None and self.surrogate is not None
            have["ratio_N"] = parts["ratio"] = _tokens(self.ratio, have)
            loss_N = _tokens(self.surrogate, have)
            parts.update(clipped(loss_N, have["ratio_N"], have["advantage_N"]))
        for correction in self.corrections:
            parts[correction.name] = _tokens(correction, have)
            loss_N = loss_N * parts[correction.name]
        for penalty in self.penalties:
            parts[penalty.name] = _tokens(penalty, have)
            loss_N = loss_N + parts[penalty.name]
        parts.update(measured)
        if self.loss is not None:
            parts[self.loss.name] = loss_N
        return Loss((have["weight_N"] * loss_N).sum(), means(parts))

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
            inner = " x ".join(map(_shown, (*self.corrections, self.loss)))
        else:
            assert self.surrogate is not None and self.ratio is not None and self.advantage is not None
            factors = [*map(_shown, self.corrections), _shown(self.surrogate)]
            scale = "" if self.normaliser is None else f"{_shown(self.normaliser)} of "
            inner = f"{' x '.join(factors)} of {_shown(self.ratio)} and {scale}{_shown(self.advantage)}"
        text = f"{_shown(self.aggregation)} of [{' + '.join([inner, *map(_shown, self.penalties)])}]"
        more = {"selection": self.selection, "proximal": self.proximal}
        if self.moves_reference:
            more["reference"] = self.reference
        return "; ".join([text, *(f"{slot} {_shown(method)}" for slot, method in more.items() if method is not None)])

    def _methods(self) -> Iterator[tuple[str, Method]]:
        singles = ("loss", "selection", "advantage", "normaliser", "proximal", "ratio", "surrogate", "aggregation")
        for slot in (*singles, "reference"):
            method = getattr(self, slot)
            if method is not None:
                yield slot, method
        for slot in ("corrections", "penalties"):
            yield from ((f"{slot}.{place}", method) for place, method in enumerate(getattr(self, slot)))


def _short(values: np.ndarray) -> str:
    return f"shape {list(values.shape)}" if values.size > 16 else f"{values.tolist()}"


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


def _shown(method: Method) -> str:
    settings = ", ".join(f"{key}={value}" for key, value in method.settings.items())
    return f"{method.name.rpartition('.')[2]}({settings})" if settings else method.name.rpartition(".")[2]
