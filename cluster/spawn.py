"""Where a component lives. Its own code cannot tell.

A component is a plain class with async methods. `here` keeps it in this process, `OnRay` makes it a Ray actor;
both return a handle on which `await handle.method(...)` means the same, from any event loop.
"""

import asyncio
import secrets
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from threading import Thread
from typing import Any, Protocol

import ray
from ray.exceptions import (
    ActorUnavailableError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from millrace.cluster.direct import Cut, Lines
from millrace.cluster.process import Component, Early, Lasting, Process, found
from millrace.cluster.supervise.nurse import Nurse
from millrace.core.errors import ConfigError

PIECE_BYTES, DESCRIBED_BYTES = 64 * 2**10, 8 * 2**20  # Ray takes arguments of 100 KiB each and 10 MiB in all in place
KILLED = "its process was killed, or crashed"
AHEAD_S = 300.0  # that a process which was started ahead may take until it takes its arguments
MARK, END_OF_FILE = "Worker exit detail:", "connection error code 2"  # in what Ray says of a dead actor


class Spawn(Protocol):
    """How `wire` makes its components."""

    def __call__(
        self,
        component: Component,
        *args: Any,
        name: str,
        gpus: float = 0,
        home: bool = False,
        lasting: bool = False,
        **kwargs: Any,
    ) -> Any:
        """
        Args:
            home: on the machine of the caller, whose disk holds the run directory.
            lasting: its handle outlives its process: another one is started in its place, with the same arguments.
        """
        ...

    def end(self, name: str) -> None:
        """End the component of this name, whatever it does; one that ended already does not mind."""
        ...

    def nurse(self, node: str) -> Any:
        """Who looks at processes of a machine; see `whereabouts`."""
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


class InProcess:
    """Components in this process and event loop."""

    def __call__(
        self,
        component: Component,
        *args: Any,
        name: str,
        gpus: float = 0,
        home: bool = False,
        lasting: bool = False,
        **kwargs: Any,
    ) -> Here:
        return Here(found(component)(*args, **kwargs), asyncio.get_running_loop())

    def end(self, name: str) -> None:
        """What runs in this process ends when its tasks are cancelled."""

    def nurse(self, node: str) -> Nurse:
        return Nurse()


here = InProcess()


# How Ray says that a process was lost where it does not say it of the actor; the first when it ended it itself.
LOST = (OutOfMemoryError, WorkerCrashedError, NodeDiedError, ObjectLostError)


class Gone(ConnectionError):
    """A component's process has ended, or cannot be reached."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name} is gone: {reason}")
        self.name, self.reason = name, reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return Gone, (self.name, self.reason)


class Handle:
    """A component that is a Ray actor: `await handle.put(x)` is `await actor.put.remote(x)`.

    What the component raises arrives as it was raised. A dead component is `Gone`; one whose constructor failed is a
    ConnectionRefusedError. Calls of a component that many call go past Ray where it is on the caller's machine.
    """

    def __init__(self, actor: Any, name: str, *, near: bool = False) -> None:
        self._actor = actor
        self._name = name
        self._lines = Lines(self._door) if near else None

    def __getattr__(self, method: str) -> Callable[..., Awaitable[Any]]:
        if method.startswith("__"):
            raise AttributeError(method)

        async def call(*args: Any, **kwargs: Any) -> Any:
            caller = None if self._lines is None else await self._lines.caller()
            if caller is None:
                return await self._by_ray(method, args, kwargs)
            try:
                return await caller.call(method, args, kwargs)
            except Cut:
                raise Gone(self._name, KILLED) from None

        return call

    async def _door(self) -> str:
        """Where it is called without Ray; "" on another machine."""
        node, address = await self._by_ray("door", (), {})
        return address if node == ray.get_runtime_context().get_node_id() else ""

    async def _by_ray(self, method: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        try:
            return await self._actor.call.remote(method, args, kwargs)
        except RayTaskError as caught:
            raise caught.cause from None
        except RayActorError as caught:
            if caught.actor_init_failed:
                raise ConnectionRefusedError(f"{self._name} could not be started: {_reason(caught)}") from None
            raise Gone(self._name, _reason(caught)) from None
        except LOST as caught:
            raise Gone(self._name, _reason(caught)) from None

    def __reduce__(self) -> tuple[Any, tuple[Any, str, bool]]:
        return _handle, (self._actor, self._name, self._lines is not None)

    def __repr__(self) -> str:
        return f"Handle({self._name})"


def _handle(actor: Any, name: str, near: bool) -> Handle:
    return Handle(actor, name, near=near)


def _reason(error: RayError) -> str:
    """What Ray's report says of why: what the constructor raised, or how the process ended."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, OutOfMemoryError):
        return f"out of memory: {lines[0]}"
    detail = next((line.partition(MARK)[2] for line in lines if MARK in line), "")
    if END_OF_FILE in detail or isinstance(error, ActorUnavailableError):  # all that Ray sees of a kill
        return KILLED
    if not detail:
        return lines[-1]
    return detail.partition(" Some common causes")[0].strip()


class OnRay:
    """Spawn components as Ray actors, and take all of them down again."""

    PROCESS, LASTING = Process, Lasting

    def __init__(self) -> None:
        self._actors: dict[str, Any] = {}
        self._nurses: dict[str, Any] = {}
        self._fitted: set[str] = set()  # names that found their GPUs: where a machine was lost, it may come back
        self._arguments: dict[str, Any] = {}  # of lasting ones, in Ray's object store
        self._ahead: dict[str, socket.socket] = {}  # where those that were started ahead ask for theirs

    def __call__(
        self,
        component: Component,
        *args: Any,
        name: str,
        gpus: float = 0,
        home: bool = False,
        lasting: bool = False,
        **kwargs: Any,
    ) -> Handle:
        available = ray.cluster_resources().get("GPU", 0)
        if gpus > available and name not in self._fitted:
            raise ConfigError(
                f"{name} asks for {gpus:g} GPUs, but the Ray cluster has {available:g}: "
                "lower `gpus` in the run's configuration, or join a cluster with --address"
            )
        self._fitted.add(name)
        whole = (component, args, kwargs)
        if (listener := self._ahead.pop(name, None)) is not None:
            Thread(target=_hand, args=(listener, ray.cloudpickle.dumps(whole)), daemon=True).start()
            return Handle(self._actors[name], name)
        options: dict[str, Any] = {"num_gpus": gpus, "max_restarts": -1 if lasting else 0}
        if home:
            options["scheduling_strategy"] = _on(ray.get_runtime_context().get_node_id())
        self.end(name)
        given = self._kept(name, whole) if lasting else whole
        self._actors[name] = _actor(self.LASTING if lasting else self.PROCESS, component, options, given)
        return Handle(self._actors[name], name, near=lasting)

    def ahead(self, component: Component, prepare: Callable[[], object], *, name: str, gpus: float = 0) -> None:
        """Start the process of a component on this machine that will be spawned by this name, not lasting.

        Args:
            prepare: what it does until its arguments are known: imports.
        """
        address = f"millrace-ahead-{secrets.token_hex(16)}"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(f"\0{address}")
        listener.listen(1)
        self._ahead[name] = listener
        self._actors[name] = _actor(Early, component, {"num_gpus": gpus}, (prepare, address))

    def _kept(self, name: str, arguments: Any) -> tuple[Any, ...]:
        """Arguments that a restarted process gets again: Ray forgets large ones when they were used once.

        Pieces that are small enough stay in its description of the actor; a whole that is too large for it is held in
        the object store, which Ray warns of.
        """
        whole = ray.cloudpickle.dumps(arguments)
        if len(whole) <= DESCRIBED_BYTES:
            return tuple(whole[at : at + PIECE_BYTES] for at in range(0, len(whole), PIECE_BYTES))
        self._arguments[name] = ray.put(arguments)
        return ([self._arguments[name]],)

    def end(self, name: str) -> None:
        if (listener := self._ahead.pop(name, None)) is not None:
            listener.close()
        actor = self._actors.pop(name, None)
        if actor is not None:
            ray.kill(actor, no_restart=True)

    def nurse(self, node: str) -> Any:
        if node not in self._nurses:
            if node == ray.get_runtime_context().get_node_id():
                self._nurses[node] = Nurse()
            else:
                own = type("Nurse", (Process,), {})
                options = {"num_cpus": 0, "max_restarts": -1, "scheduling_strategy": _on(node)}
                actor = ray.remote(own).options(**options).remote(Nurse, (), {})
                self._nurses[node] = Handle(actor, f"the nurse of node {node[:8]}")
        return self._nurses[node]

    def kill(self) -> None:
        """End every actor that was spawned; those that ended already do not mind."""
        for name in tuple(self._actors):
            self.end(name)


def _actor(process: type[Process], component: Component, options: Mapping[str, Any], given: Sequence[Any]) -> Any:
    # Ray wraps the methods of the class it is given, in place. Methods of one actor run concurrently: a long poll must
    # not hold a heartbeat.
    own = type(_short(component), (process,), {})
    return ray.remote(own).options(num_cpus=0, max_concurrency=1000, **options).remote(*given)


def _hand(listener: socket.socket, whole: bytes) -> None:
    """Give a process that was started ahead its arguments; one that has ended is found by its pings."""
    listener.settimeout(AHEAD_S)
    with listener, suppress(OSError):
        link, _ = listener.accept()
        with link:
            link.sendall(whole)


def _short(component: Component) -> str:
    """Its name without its module, which is what its process is called."""
    return component.rpartition(":")[2] if isinstance(component, str) else component.__name__


def _on(node: str) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node, soft=False)
