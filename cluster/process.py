"""What runs in the process of a component: the component itself, and how it is reached."""

import gc
import os
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any

import ray

from millrace.cluster.direct import Door, same_user
from millrace.core.errors import MillraceError

Component = type | str  # its class, or where that is: "package.module:Class"

# New objects, and younger collections, at which a process looks for garbage: a lasting one, and one that holds much
# and also runs code of the user's, whose garbage may be large.
COLLECTED_AT = (100_000, 50, 100)
HOLDING_COLLECTED_AT = (10_000, 10, 10)


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
        if getattr(self._component, "HOLDS_MANY", False):
            _settle(HOLDING_COLLECTED_AT)

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
        _settle(COLLECTED_AT)


class Early(Process):
    """The process of a component that is started before its arguments are known, see `OnRay.ahead`."""

    def __init__(self, prepare: Callable[[], object], address: str) -> None:
        with suppress(MillraceError):  # the component meets it again, and says so
            prepare()
        with socket.socket(socket.AF_UNIX) as link:
            link.connect(f"\0{address}")
            if not same_user(link):
                raise PermissionError(f"{address} is a socket of another user")
            with link.makefile("rb") as file:
                whole = file.read()
        super().__init__(*ray.cloudpickle.loads(whole))


def _settle(thresholds: tuple[int, int, int]) -> None:
    """What is imported is no garbage, nor what is held; a collection looks through all of it every few thousand
    rollouts, for a tenth of a second."""
    gc.freeze()
    gc.set_threshold(*thresholds)
