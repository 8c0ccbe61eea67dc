"""Shapers whose strength follows the step."""

import inspect
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from pydantic import NonNegativeInt, PositiveInt

from millrace.core import catalogue
from millrace.core.catalogue import Spec, resolve
from millrace.core.errors import RewardError
from millrace.core.types import Floats
from millrace.core.words import SLOTS

FOLDER = "millrace.rewards.shapers"
NEEDED = inspect.Parameter.empty


@dataclass
class scheduled:
    """Another shaper, at a strength that moves with the optimiser step: warmed up, faded out or switched on.

        p = clip((step - after) / steps, 0, 1)          (1 - cos(pi * p)) / 2 in its place for the cosine curve
        w = start + (end - start) * p
        r' = r + w * (shaper(r) - r)

    Source: the warmed-up length penalty of Kimi k1.5 (Kimi Team 2025), arXiv:2501.12599, section 2.3.3.

    It asks for the words of the shaper it runs, and remembers what that one remembers.

    Args:
        shaper: a name of this catalogue, "file.py:function" or a table with settings.
        steps: over how many steps the strength moves; 1 switches it.
        after: the step at which it begins to move.
        start: the strength up to there; 0 leaves the rewards as they are, 1 is the shaper itself.
        end: the strength from `after + steps` on.
        curve: how it moves between the two.
        inner_memory: what the shaper remembers.
    Returns:
        reward_G, between what came in and what the shaper makes of it, for strengths in [0, 1].

    >>> warm = scheduled(shaper={"name": "truncation_penalty", "penalty": 1.0}, steps=10)
    >>> [float(warm(np.ones(1, np.float32), np.array([True]), step)[0]) for step in (0, 5, 20)]
    [1.0, 0.5, 0.0]
    """

    shaper: Spec
    steps: PositiveInt
    after: NonNegativeInt = 0
    start: float = 0.0
    end: float = 1.0
    curve: Literal["linear", "cosine"] = "linear"
    inner_memory: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        inner = resolve(self.shaper, folder=FOLDER, words=SLOTS["shaper"], slot="shaper", error=RewardError)
        if inner.is_async:
            raise RewardError(f"scheduled: {inner.name} is async: a shaper must not wait")
        self._inner = inner
        self.inner_memory = catalogue.memory(inner)
        optional = {word: default for word, default in inner.optional.items() if word not in ("reward_G", "step")}
        needed = dict.fromkeys(("reward_G", *inner.needs, "step"))
        self._words = (*needed, *optional)
        # What it asks for is what the other asks for: the signature is how core/catalogue.py learns of it.
        self.__signature__ = inspect.Signature(
            [
                inspect.Parameter(word, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=optional.get(word, NEEDED))
                for word in self._words
            ]
        )

    def __call__(self, *words: Any) -> Floats:
        have = dict(zip(self._words, words, strict=True))
        progress = min(max((have["step"] - self.after) / self.steps, 0.0), 1.0)
        if self.curve == "cosine":
            progress = (1.0 - float(np.cos(np.pi * progress))) / 2
        weight = self.start + (self.end - self.start) * progress
        catalogue.restore(self._inner, self.inner_memory)
        reward_G = np.asarray(have["reward_G"], np.float64)
        shaped_G = self._inner.call(have)
        self.inner_memory = catalogue.memory(self._inner)
        return np.asarray(reward_G + weight * (shaped_G - reward_G), np.float32)
