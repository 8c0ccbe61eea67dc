"""Where a component lives. Its own code cannot tell.

A component is a plain class with async methods. `here` keeps it in this process, `OnRay` makes it a Ray actor;
both return a handle on which `await handle.method(...)` means the same, from any event loop.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from millrace.core.errors import ConfigError


class Spawn(Protocol):
    """How `wire` makes its components."""

    def __call__(self, cls: type, *args: Any, name: str, gpus: float = 0, home: bool = False, **kwargs: Any) -> Any:
        """`home`: on the machine of the caller, whose disk holds the run directory."""
        ...


class Here:
    """A component in this process. Calls from another thread's event loop run on the component's own."""

    def __init__(self, component: Any, home: asyncio.AbstractEventLoop) -> None:
        self._component = component
        self._home = home

    def __getattr__(self, method: str) -> Callable[..., Awaitable[Any]]:
        bound = getattr(self._component, method)

        async def call(*args: Any, **kwargs: Any) -> Any:
            if asyncio.get_running_loop() is self._home:
                return await bound(*args, **kwargs)
            return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(bound(*args, **kwargs), self._home))

        return call


def here(cls: type, *args: Any, name: str, gpus: float = 0, home: bool = False, **kwargs: Any) -> Here:
    """A component in this process and event loop."""
    return Here(cls(*args, **kwargs), asyncio.get_running_loop())


class Handle:
    """A component that is a Ray actor: `await handle.put(x)` is `await actor.put.remote(x)`.

    What the component raises arrives as it was raised. A dead component is a ConnectionError that names it.
    """

    def __init__(self, actor: Any, name: str) -> None:
        self._actor = actor
        self._name = name

    def __getattr__(self, method: str) -> Callable[..., Awaitable[Any]]:
        if method.startswith("__"):
            raise AttributeError(method)
        remote = getattr(self._actor, method).remote

        async def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return await remote(*args, **kwargs)
            except RayTaskError as caught:
                raise caught.cause from None
            except RayActorError as caught:
                raise ConnectionError(f"{self._name} is gone: {_reason(caught)}") from None

        return call

    def __reduce__(self) -> tuple[type, tuple[Any, str]]:
        return Handle, (self._actor, self._name)

    def __repr__(self) -> str:
        return f"Handle({self._name})"


def _reason(error: RayActorError) -> str:
    """The line of Ray's report that says why: what the constructor raised, or how the process ended."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    exit_detail = next((line for line in lines if "exit detail" in line), None)
    return exit_detail or lines[-1]


class OnRay:
    """Spawn components as Ray actors, and take all of them down again."""

    def __init__(self) -> None:
        self._actors: dict[str, Any] = {}

    def __call__(self, cls: type, *args: Any, name: str, gpus: float = 0, home: bool = False, **kwargs: Any) -> Handle:
        available = ray.cluster_resources().get("GPU", 0)
        if gpus > available:
            raise ConfigError(
                f"{name} asks for {gpus:g} GPUs, but the Ray cluster has {available:g}: "
                "lower `gpus` in the run's configuration, or join a cluster with --address"
            )
        # Methods of one actor run concurrently: a long poll must not hold a heartbeat.
        options: dict[str, Any] = {"num_cpus": 0, "num_gpus": gpus, "max_concurrency": 1000, "max_restarts": 0}
        if home:
            node = ray.get_runtime_context().get_node_id()
            options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=False)
        own = type(cls.__name__, (cls,), {})  # Ray wraps the methods of the class it is given, in place
        actor = ray.remote(own).options(**options).remote(*args, **kwargs)
        self._actors[name] = actor
        return Handle(actor, name)

    def kill(self) -> None:
        """End every actor that was spawned; those that ended already do not mind."""
        for actor in self._actors.values():
            ray.kill(actor, no_restart=True)
        self._actors.clear()
