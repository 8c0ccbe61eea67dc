"""A recipe is all there is to a method: which functions fill the slots, and their settings. Data, not code.

    rewards.verifier = "exact"
    objective = { advantage = "rloo", surrogate = { name = "clip", high = 0.28 } }
    updates = { epochs = 2, minibatches = 4 }

Wherever a recipe is asked for, one may give the name of a file in recipes/, a path to a file of one's own, a table,
or a table with `name`: that recipe, with what the table says instead.
"""

import tomllib
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from millrace.core.catalogue import split
from millrace.core.config import Config
from millrace.core.errors import ConfigError, RecipeError, nearest
from millrace.core.references import absolute


def _spec(value: Any) -> Any:
    split(value, slot="a method", error=RecipeError)
    return value


def _several(value: Any) -> Any:
    return [value] if isinstance(value, str | Mapping) else value


Spec = Annotated[str | dict[str, Any], BeforeValidator(_spec)]
Specs = Annotated[tuple[Spec, ...], BeforeValidator(_several)]


class Rewards(Config):
    """How rollouts are judged, and which groups are learnt from."""

    verifier: Spec | None = None
    """Rollout -> score: a name in rewards/verifiers/ or one's own function. None where the data is given answers."""

    shapers: Specs = ()
    """Applied to a group's rewards in order."""

    filters: Specs = ()
    """Which judged groups are worth learning from; all must agree."""


POLICY_GRADIENT = ("advantage", "normaliser", "ratio", "surrogate", "corrections", "proximal")


class ObjectiveConfig(Config):
    """The slots of a loss: aggregate(product of corrections x surrogate(ratio, advantage) + sum of penalties).

    Or a whole loss by name, as `"nll"` or `{ name = "dpo", beta = 0.1, selection = "best_and_worst" }`; keys that are
    slots stay slots.
    """

    loss: Spec | None = None
    """A whole loss from learner/objectives/ instead of the policy gradient's slots."""

    selection: Spec | None = None
    """Words of a group -> keep_G: which of its rollouts are learnt from. None: all."""

    advantage: Spec = "grpo"
    """Words of a group -> advantage_G, or advantage_N for all of its response tokens."""

    normaliser: Spec | None = None
    """The advantages of the whole batch -> the same, on another scale."""

    proximal: Spec | None = None
    """What the policy as the step began is taken to be. None: it is computed."""

    ratio: Spec = "token"
    """Of the policy to an earlier one."""

    surrogate: Spec = "clip"
    """Ratio and advantage -> loss_N."""

    corrections: Specs = ()
    """Off-policy weights, multiplied on the surrogate."""

    penalties: Specs = ()
    """Added to the surrogate."""

    aggregation: Spec = "token_mean"
    """What weighs the same: a token, a sequence, a prompt."""

    reference: Spec = "frozen"
    """Step -> how far the reference model then moves towards the policy."""

    @model_validator(mode="before")
    @classmethod
    def _whole_loss(cls, data: Any) -> Any:
        """`"nll"` and `{ name = ..., settings }` become `loss`."""
        if isinstance(data, str):
            return {"loss": data}
        if not isinstance(data, Mapping) or "name" not in data:
            return data
        return {
            "loss": {key: value for key, value in data.items() if key not in cls.model_fields},
            **{key: value for key, value in data.items() if key in cls.model_fields},
        }

    @model_validator(mode="after")
    def _one_or_the_other(self) -> Self:
        both = sorted(self.model_fields_set.intersection(POLICY_GRADIENT))
        if self.loss is not None and both:
            name, _ = split(self.loss, slot="objective")
            raise ValueError(f"'{name}' is a whole loss and takes no {', '.join(both)}: leave out one or the other")
        return self


class Updates(Config):
    """How often what was generated is learnt from."""

    epochs: int = Field(default=1, ge=1)
    """Passes over a batch before the weights are published."""

    minibatches: int = Field(default=1, ge=1)
    """Optimiser steps of one pass; groups stay whole."""

    reuse: int = Field(default=1, ge=1)
    """Batches that may train one group, each within max_lag."""

    @property
    def per_batch(self) -> int:
        """Optimiser steps of one batch."""
        return self.epochs * self.minibatches


class Recipe(Config):
    """A method, composed."""

    origin: str = "inline"
    """Where it came from: a name in recipes/, or a path."""

    rewards: Rewards = Rewards()
    """How rollouts are judged."""

    objective: ObjectiveConfig
    """What is minimised."""

    updates: Updates = Updates()
    """How often."""

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, data: Any) -> Any:
        """A name, a path, or a table with `name` becomes the recipe's full table."""
        if isinstance(data, str):
            return _read(data)
        if isinstance(data, Mapping) and "name" in data:
            return _merged(_read(str(data["name"])), {key: value for key, value in data.items() if key != "name"})
        return data

    def anchored(self, root: Path) -> "Recipe":
        """The same, with every reference to a file made absolute; relative ones start at `root`."""
        return Recipe.model_validate(_mapped(self.model_dump(exclude_unset=True), lambda text: absolute(text, root)))


def load(recipe: str | Mapping[str, Any] | Recipe, *, root: Path | None = None) -> Recipe:
    """A recipe by name, by path, or as a table; references to files made absolute.

    Args:
        recipe: `"grpo"`, `"my/recipe.toml"`, a table, or `{"name": "grpo", "rewards": {...}}`.
        root: where relative paths of a table start; the working directory if None. Paths inside a recipe's file
            start at that file.

    Raises:
        RecipeError: unknown name or key, missing file, or not TOML.

    >>> load("rloo").objective.surrogate
    'reinforce'
    >>> load({"name": "grpo", "objective": {"surrogate": {"high": 0.28}}}).objective.surrogate
    {'name': 'clip', 'low': 0.2, 'high': 0.28}
    """
    root = root or Path.cwd()
    if isinstance(recipe, Recipe):
        return recipe.anchored(root)
    if isinstance(recipe, str):
        recipe = _from(recipe, root)
    elif "name" in recipe:
        recipe = {**recipe, "name": _from(str(recipe["name"]), root)}
    try:
        return Recipe.parse(recipe, source="recipe").anchored(root)  # type: ignore[arg-type]  # a name is expanded
    except RecipeError:
        raise
    except ConfigError as caught:
        raise RecipeError(str(caught)) from None


def names() -> tuple[str, ...]:
    """The recipes that come with millrace.

    >>> {"grpo", "sft"} <= set(names())
    True
    """
    return tuple(sorted(entry.name.removesuffix(".toml") for entry in _folder().iterdir() if _is_path(entry.name)))


def _folder() -> Any:
    return files("millrace") / "recipes"


def _is_path(recipe: str) -> bool:
    return recipe.endswith(".toml")


def _from(recipe: str, root: Path) -> str:
    return str(root / Path(recipe).expanduser()) if _is_path(recipe) else recipe


def _read(recipe: str, *, through: tuple[str, ...] = ()) -> dict[str, Any]:
    if _is_path(recipe):
        path = Path(recipe).expanduser().resolve()
        if not path.is_file():
            raise RecipeError(f"there is no recipe {path}; by name there are {', '.join(names())}")
        text, origin = path.read_text(encoding="utf-8"), str(path)
    else:
        known = names()
        if recipe not in known:
            raise RecipeError(
                f"unknown recipe '{recipe}'{nearest(recipe, known) or '.'} There are {', '.join(known)};"
                " one's own is a path that ends in .toml"
            )
        text, origin = (_folder() / f"{recipe}.toml").read_text(encoding="utf-8"), recipe
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as caught:
        raise RecipeError(f"recipe {origin} is not TOML: {caught}") from None
    if _is_path(recipe):
        table = _mapped(table, lambda text: absolute(text, path.parent))
    if "name" in table:
        if origin in through:
            raise RecipeError(f"recipe {origin} starts from itself: {' -> '.join((*through, origin))}")
        base = str(table.pop("name"))
        base = _from(base, path.parent) if _is_path(recipe) else base
        table = _merged(_read(base, through=(*through, origin)), table)
    return {**table, "origin": origin}


def _merged(base: Any, over: Any) -> Any:
    """`over` upon `base`, key by key. A table with `name` replaces a method; one without changes its settings."""
    if not isinstance(over, Mapping) or "name" in over:
        return over
    if isinstance(base, str):
        base = {"name": base}
    if not isinstance(base, Mapping):
        return over
    return {**base, **{key: _merged(base[key], value) if key in base else value for key, value in over.items()}}


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """The same table with `change` applied to every string in it."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _mapped(inner, change) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(inner, change) for inner in value]
    return value
