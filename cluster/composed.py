"""What a recipe comes to: the formula with its numbers, what judges, and what a run must supply."""

from collections.abc import Iterator, Mapping
from typing import Any

from millrace.core import words
from millrace.core.catalogue import Spec, split
from millrace.core.recipe import Recipe, Updates
from millrace.core.recipe import load as load_recipe
from millrace.learner.objective import Objective
from millrace.rewards.shaping import Shaping


def described(name: str, text: str) -> str:
    """A recipe for a person.

    Args:
        name: in recipes/, or the path of a file.
        text: of its file.
    Raises:
        RecipeError: it cannot be composed.
    """
    return "\n".join(_lines(load_recipe(name), text))


def _lines(recipe: Recipe, text: str) -> Iterator[str]:
    objective = Objective.of(recipe.objective, models=frozenset(words.NEEDS_MODEL.values()))
    shaping = Shaping.of(recipe.rewards)
    yield f"{recipe.origin}"
    yield from (f"  {line}" for line in header(text))
    yield ""
    yield f"loss       {objective}"
    rewards = recipe.rewards
    if not objective.learns_from_rewards:
        yield "rewards    none: it learns from the data's answers"
    else:
        yield f"verifier   {_spec(rewards.verifier) if rewards.verifier is not None else 'the run names one'}"
    for slot, specs in (("shapers", rewards.shapers), ("filters", rewards.filters)):
        if specs:
            yield f"{slot:<10} {', then '.join(map(_spec, specs))}"
    if (said := _updates(recipe.updates)) and objective.learns_from_rewards:
        yield f"updates    {said}"
    asked = objective.asks | objective.asks_of_groups | shaping.words
    models = sorted({model for word, model in words.NEEDS_MODEL.items() if word in asked})
    yield f"models     the policy{''.join(f' and a {model} model' for model in models)}"


def header(text: str) -> list[str]:
    """The comment that a recipe's file begins with.

    >>> header('# GRPO: DeepSeekMath (Shao et al. 2024).\\nobjective = "nll"  # and so on')
    ['GRPO: DeepSeekMath (Shao et al. 2024).']
    """
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return lines


def _spec(spec: Spec) -> str:
    name, settings = split(spec, slot="rewards")
    return f"{name}({_settings(settings)})" if settings else name


def _settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in settings.items())


def _updates(updates: Updates) -> str:
    """How often a batch is learnt from, where it is not once."""
    said = []
    if updates.epochs > 1:
        said.append(f"{updates.epochs} passes over a batch")
    if updates.minibatches > 1:
        said.append(f"{updates.minibatches} optimiser steps a pass")
    if updates.reuse > 1:
        said.append(f"a group may train {updates.reuse} batches")
    return ", ".join(said) or "one optimiser step a batch, each group once"
