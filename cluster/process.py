"""What runs in the process of a component: the component itself, and how it is reached."""

import gc
import os
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import ray

from millrace.cluster.direct import Door

Component = type | str  # its class, or where that is: "package.module:Class"

COLLECTED_AT = (100_000, 50, 100)  # new objects, and younger collections, at which a lasting process looks for garbage


def found(component: Component) -> Any:
    """The class.

    >>> found("fractions:Fraction")(1, 2)
    Fraction(1, 2)
    """
    if not isinstance(component, str):
        return component
    module, _, name = component.partition(":")
    return getattr(import_module(module), name)


class Process:
    """What Ray sees of a component. Whoever spawns one need not import what it works with."""

    OWN = frozenset({"whereabouts", "door"})  # methods that are not the component's

    def __init__(self, component: Component, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        self._component = found(component)(*args, **kwargs)
        self._opened: Door | None = None

    async def call(self, method: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Of the component, or of its process."""
        return await getattr(self if method in self.OWN else self._component, method)(*args, **kwargs)

    async def whereabouts(self) -> tuple[str, int]:
        """The id of its machine in Ray, and its process."""
        return ray.get_runtime_context().get_node_id(), os.getpid()

    async def door(self) -> tuple[str, str]:
        """The id of its machine in Ray, and the address of its door there."""
        if self._opened is None:
            self._opened = Door(self.call)
        return ray.get_runtime_context().get_node_id(), self._opened.address


class Lasting(Process):
    """The process of a component that is started again with the same arguments, see `OnRay`."""

    def __init__(self, *kept: Any) -> None:
        whole = ray.get(kept[0][0]) if isinstance(kept[0], list) else ray.cloudpickle.loads(b"".join(kept))
        super().__init__(*whole)
        # What it imported and holds is no garbage; a collection looks through all of it every few thousand rollouts.
        gc.freeze()
        gc.set_threshold(*COLLECTED_AT)
