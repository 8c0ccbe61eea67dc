"""What happens to the rewards of a judged group before it is learnt from: shapers in order, then filters.

A shaper is a function of a group's words (core/words.py: GROUP and JUDGED) -> reward_G; a filter of the same words ->
bool, True to keep the group. Both may have memory (core/catalogue.py), which goes into the checkpoint.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from millrace.core import catalogue
from millrace.core.catalogue import Method, Spec, resolve
from millrace.core.errors import RewardError, boundary
from millrace.core.recipe import Rewards
from millrace.core.types import Floats
from millrace.core.words import SLOTS

FOLDERS = {"shaper": "millrace.rewards.shapers", "filter": "millrace.rewards.filters"}


@dataclass(frozen=True)
class Shaping:
    """The shapers and filters of one run, resolved.

    >>> from millrace.core.recipe import Rewards
    >>> shaping = Shaping.of(Rewards(shapers=[{"name": "affine", "scale": 2.0}], filters=["no_signal"]))
    >>> have = {"reward_G": np.array([0, 1, 1], np.float32)}
    >>> shaping.shape(have)
    array([0., 2., 2.], dtype=float32)
    >>> shaping.keep(have), shaping.keep({"reward_G": np.ones(3, np.float32)})
    ('', 'filters.no_signal')
    """

    shapers: tuple[Method, ...]
    filters: tuple[Method, ...]

    @classmethod
    def of(cls, rewards: Rewards) -> Self:
        """What a recipe's [rewards] names.

        Raises:
            RewardError: a method is unknown or async, asks for what a judged group lacks, or has a wrong setting.
        """
        return cls(_resolved("shaper", rewards.shapers), _resolved("filter", rewards.filters))

    @property
    def words(self) -> frozenset[str]:
        """Every word that its methods ask for."""
        return frozenset().union(*(method.words for method in (*self.shapers, *self.filters)))

    def shape(self, have: Mapping[str, Any]) -> Floats:
        """The rewards after all shapers; each sees those that the one before it returned.

        Args:
            have: the words of one judged group.
        Returns:
            reward_G, a new array; that of a group without a valid verdict is empty, and no shaper is called.
        Raises:
            RewardError: a shaper raised, or returned another shape than [G] or what is not finite.
        """
        reward_G = np.array(have["reward_G"], np.float32)
        for method in self.shapers if len(reward_G) else ():
            with boundary(f"shaper {method.name}", RewardError):
                # A copy: a shaper may write into what it gets, and the message shows what it got.
                value = method.call({**have, "reward_G": reward_G.copy()})
            reward_G = _rewards(value, method.name, reward_G)
        return reward_G

    def keep(self, have: Mapping[str, Any]) -> str:
        """Whether the group is learnt from: empty, or the name of the first filter that rejects it.

        Filters after that one are not called: those with memory see the groups that the ones before them keep.

        Args:
            have: the words of one judged group; its `reward_G` is what the filters see.
        Raises:
            RewardError: a filter raised, or returned anything but a bool.
        """
        for method in self.filters if len(have["reward_G"]) else ():
            with boundary(f"filter {method.name}", RewardError):
                kept = method.call(have)
            if not isinstance(kept, bool | np.bool_):
                raise RewardError(
                    f"filter {method.name} returned {_shown(kept)}, a {type(kept).__name__}, for the rewards "
                    f"{_shown(have['reward_G'])}: return True to keep the group, False to drop it"
                )
            if not kept:
                return method.name
        return ""

    def memory(self) -> dict[str, Any]:
        """What the methods with memory remember, by slot: `{"shapers.0": {...}}`. Plain JSON values.

        Raises:
            RewardError: a method remembers what JSON cannot hold.
        """
        saved = {}
        for slot, method in self._by_slot().items():
            remembered = catalogue.memory(method)
            if not remembered:
                continue
            try:
                json.dumps(remembered, allow_nan=False)
            except (TypeError, ValueError) as caught:
                raise RewardError(
                    f"{slot} {method.name} remembers what no checkpoint can hold: {caught}; its init=False fields must "
                    "be finite numbers, strings, lists and dicts with string keys"
                ) from None
            saved[slot] = remembered
        return saved

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Give the methods their memory back.

        Raises:
            RewardError: what was saved is another recipe's.
        """
        slots = self._by_slot()
        for slot in saved:
            if slot not in slots:
                raise RewardError(
                    f"the checkpoint holds memory of {slot}, but the recipe has {', '.join(slots) or 'no methods'}: "
                    "resume with the recipe that the run was started with"
                )
        for slot, method in slots.items():
            catalogue.restore(method, saved.get(slot, {}))

    def _by_slot(self) -> dict[str, Method]:
        return {f"shapers.{i}": method for i, method in enumerate(self.shapers)} | {
            f"filters.{i}": method for i, method in enumerate(self.filters)
        }


def _resolved(slot: str, specs: Sequence[Spec]) -> tuple[Method, ...]:
    methods = tuple(
        resolve(spec, folder=FOLDERS[slot], words=SLOTS[slot], slot=slot, error=RewardError) for spec in specs
    )
    for method in methods:
        if method.is_async:
            raise RewardError(
                f"{slot} {method.name} is async: it runs within the learner's step and must not wait; "
                "what waits belongs into a verifier, as a component of its verdict"
            )
    return methods


def _rewards(value: Any, name: str, given_G: Floats) -> Floats:
    """What a shaper returned, checked."""
    try:
        with np.errstate(over="ignore"):  # it becomes infinite, and is refused below
            shaped_G = np.array(value, np.float32)
    except (TypeError, ValueError):
        shaped_G = np.array(None, object)
    wrong = ""
    if shaped_G.dtype == object:
        wrong = f"a {type(value).__name__}, which is no array of numbers"
    elif shaped_G.shape != given_G.shape:
        wrong = f"of shape {list(shaped_G.shape)}"
    elif not np.isfinite(shaped_G).all():
        wrong = "not all of it finite"
    if wrong:
        raise RewardError(
            f"shaper {name} got the rewards {_shown(given_G)} and returned {_shown(value)}, {wrong}: return one finite "
            f"reward for each of the {len(given_G)} rollouts, in their order"
        )
    return shaped_G


def _shown(value: Any) -> str:
    text = " ".join((np.array2string(value, threshold=16) if isinstance(value, np.ndarray) else repr(value)).split())
    return text if len(text) <= 160 else text[:157] + "..."
