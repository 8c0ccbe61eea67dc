"""Keeps the components of a run in being: starts, watches and restarts them.

    starting -> serving -> left
        \\        |  ^\\
         \\       v  | suspect
          +---> lost -> restarting -> starting          until the budget is spent: given up, and the run ends

Queue and weight store are watched too, but restarted by Ray, because others hold their handles. Whatever a lost worker
had leased is leased to others at once; what it comes back as must join anew and prove its weights before it serves.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from millrace.cluster.incidents import role_of, said
from millrace.cluster.snapshot import ComponentState
from millrace.cluster.spawn import KILLED, Gone, Handle, Spawn
from millrace.cluster.supervise.config import SuperviseConfig
from millrace.cluster.supervise.policy import OWN_ERROR, Budget, Watch
from millrace.core.calls import persist
from millrace.core.errors import (
    ComponentLost,
    DeadlineError,
    EngineDeadError,
    EngineError,
    Fenced,
    MillraceError,
    UserCodeError,
    WeightsError,
    boundary,
)
from millrace.core.protocols import Clock
from millrace.core.types import GroupId

T = TypeVar("T")
Tell = Callable[..., None]  # kind, **facts: a row of events.jsonl

PING_S = 1.0
LOOK_S = 2.0  # silence after which its process is looked at
AGAIN_S = 0.2  # between two attempts at reaching a queue or store that Ray restarts
LOSSES = (EngineDeadError, DeadlineError, Fenced)  # errors that a new process may well not have
OWN = (EngineError, WeightsError, UserCodeError)  # and those that it may have again
NOT_STARTED = 2  # restarts that one counts whose constructor failed: what it met, as full memory, may go away


@dataclass(frozen=True, slots=True)
class Loss:
    """Why a component does not run any more."""

    cause: str
    count: int = 1  # restarts that it takes of the budget
    fence: str = "crashed"  # the ledger's word for it
    error: MillraceError | None = None  # that it raised itself


@dataclass(eq=False)
class Component:
    """One that should exist, and its present incarnation."""

    name: str
    make: Callable[[], Any]  # a new incarnation; of those that Ray restarts, the lasting handle
    budget: Budget
    handle: Any = None
    state: ComponentState = "starting"
    pid: int = 0  # 0 while it is not known
    node: str = ""
    restarts: int = 0
    since_s: float = field(default_factory=time.time)  # in this state, unix
    cause: str = ""  # of its last loss
    oom_kills: int = 0  # of its machine, when it began to serve
    answered_at: float | None = None  # on the supervisor's clock
    lost_at: float | None = None  # the same, while it is lost

    def enter(self, state: ComponentState) -> None:
        if state != self.state:
            self.state, self.since_s = state, time.time()


class Supervisor:
    """Of one run.

    Args:
        queue: fences what lost workers held.
        lasting: name -> handle, of components that Ray restarts.
        makers: name -> how a new incarnation is made, of the others; each has `run`.
        tell: receives events.
        say: receives lines for a person.
        lost: called when a component was lost, before it is made anew.
    """

    def __init__(
        self,
        config: SuperviseConfig,
        *,
        spawn: Spawn,
        queue: Any,
        lasting: Mapping[str, Any],
        makers: Mapping[str, Callable[[], Any]],
        tell: Tell,
        say: Callable[[str], None],
        lost: Callable[[str], Awaitable[None]],
        clock: Clock = time.monotonic,
    ) -> None:
        self._config, self._spawn, self._queue = config, spawn, queue
        self._tell, self._say, self._lost, self._clock = tell, say, lost, clock
        self._lasting = {name: self._component(name, partial(_same, handle)) for name, handle in lasting.items()}
        self._made = {name: self._component(name, make) for name, make in makers.items()}
        self._later = asyncio.Event()
        self.incidents = 0
        self.incident = ""  # the last one, in a line
        self.ending: Callable[[str], bool] = lambda name: False  # which components need not be restarted any more

    def start(self, *, later: Collection[str] = ()) -> dict[str, asyncio.Future[None]]:
        """Make all components. Returns a task for each that ends: when it has left, or raises when it is given up.

        Args:
            later: those that are made when `start_later` is called. Until then their handle is None.
        """
        for name, each in self._made.items():
            if name not in later:
                each.handle = each.make()
        lives = {
            name: self._tend_later(each) if name in later else self._tend(each) for name, each in self._made.items()
        }
        lives |= {name: self._attend(each) for name, each in self._lasting.items()}
        return {name: asyncio.ensure_future(life) for name, life in lives.items()}

    def remember(self, incidents: Sequence[object]) -> None:
        """Those of earlier incarnations of the run, oldest first."""
        if incidents:
            self.incidents, self.incident = len(incidents), str(incidents[-1])

    def start_later(self) -> None:
        """Make what waits for it now."""
        self._later.set()

    def __getitem__(self, name: str) -> Any:
        """The handle of a component's present incarnation; None before its first."""
        return self._made[name].handle

    @property
    def names(self) -> list[str]:
        """Of the components that are made anew when they are lost."""
        return list(self._made)

    @property
    def components(self) -> Mapping[str, Component]:
        return {**self._lasting, **self._made}

    def refund(self, worker: str) -> None:
        """A loss of this worker was a prompt's fault: it takes nothing of the budget."""
        if worker in self._made:
            self._made[worker].budget.refund(1)

    def _component(self, name: str, make: Callable[[], Any]) -> Component:
        return Component(name, make, Budget(self._config))

    async def _tend_later(self, each: Component) -> None:
        await self._later.wait()
        each.handle = each.make()
        await self._tend(each)

    async def _tend(self, each: Component) -> None:
        """One component, from its first incarnation to its last."""
        while (loss := await self._life(each)) is not None:
            delay_s = await self._mourn(each, loss)
            if delay_s is None:
                each.enter("left")
                return
            await asyncio.sleep(delay_s)
            each.pid, each.node = 0, ""
            each.handle = each.make()
            each.enter("starting")
        each.enter("left")

    async def _life(self, each: Component) -> Loss | None:
        """One incarnation; None when it ended in order."""
        run = asyncio.ensure_future(self._run(each))
        watch = asyncio.ensure_future(self._watch(each))
        try:
            await asyncio.wait({run, watch}, return_when=asyncio.FIRST_COMPLETED)
            return run.result() if run.done() else watch.result()
        finally:
            for task in (run, watch):
                task.cancel()
            await asyncio.gather(run, watch, return_exceptions=True)

    async def _run(self, each: Component) -> Loss | None:
        try:
            with boundary(each.name):
                try:
                    await each.handle.run()
                except ConnectionError as caught:
                    return _unreachable(each, caught)
        except LOSSES as caught:
            return Loss(str(caught))
        except OWN as caught:
            return Loss(str(caught), count=OWN_ERROR, error=caught)
        return None

    async def _watch(self, each: Component) -> Loss:
        """Ping it until it is lost. A component of this process lives as long as this process."""
        if not isinstance(each.handle, Handle):
            self._serves(each)
            await asyncio.Event().wait()
        watch = Watch(self._config, self._clock())
        while True:
            ping = asyncio.ensure_future(each.handle.whereabouts())
            try:
                while not (await asyncio.wait({ping}, timeout=PING_S))[0]:
                    if why := await self._suspected(each, watch):
                        return Loss(why, fence="hung")
                node, pid = ping.result()
            except ConnectionError as caught:
                return _unreachable(each, caught)
            finally:
                ping.cancel()
            if each.pid not in (0, pid):  # Ray was quick: the next process answers already
                return Loss(KILLED)
            each.node, each.pid = node, pid
            each.answered_at = self._clock()
            watch.answered(each.answered_at)
            if each.state == "starting":
                each.oom_kills = await self._seen(each, "oom_kills") or 0
            self._serves(each)
            await asyncio.sleep(PING_S)

    async def _suspected(self, each: Component, watch: Watch) -> str:
        """Why a component that has not answered must be counted as lost; its process is then ended."""
        now = self._clock()
        if each.pid and watch.silent_s(now) > LOOK_S:
            each.enter("suspect")
            watch.look(now, await self._seen(each, "look", each.pid))
        why = watch.verdict(now)
        if why and each.pid:
            await self._seen(each, "end", each.pid)
        return why

    async def _seen(self, each: Component, what: str, *args: Any) -> Any:
        """What the nurse of its machine answers; None when she does not: the machine may be gone, too."""
        with suppress(MillraceError), boundary(f"{what} on the machine of {each.name}"):
            async with asyncio.timeout(LOOK_S):
                return await getattr(self._spawn.nurse(each.node), what)(*args)
        return None

    def _serves(self, each: Component) -> None:
        if each.state == "serving":
            return
        each.enter("serving")
        if each.lost_at is None:
            return
        down_s = self._clock() - each.lost_at
        each.lost_at = None
        self.incident = said(each.name, each.cause, down_s=down_s)
        self._tell("serving", component=each.name, pid=each.pid, down_s=down_s)
        self._say(f"{each.name} is back after {down_s:.1f} s (process {each.pid})")

    async def _mourn(self, each: Component, loss: Loss) -> float | None:
        """What a loss calls for. Returns how long to wait before the restart; None when none is needed any more.

        Raises:
            ComponentLost: the budget is spent.
        """
        each.lost_at = self._clock() if each.lost_at is None else each.lost_at
        each.enter("restarting")
        loss = replace(loss, cause=await self._explained(each, loss.cause))
        ending = self.ending(each.name)
        if each.name in self._made:
            self._spawn.end(each.name)
        if not isinstance(each.handle, Handle):  # no process ends with it: an engine must be closed
            with suppress(MillraceError), boundary(f"closing {each.name}"):
                await asyncio.wait_for(each.handle.close(), LOOK_S)
        groups = await self._fence(each, loss)
        held = [f"{group.draw}/{group.attempt}" for group in groups]
        each.cause = loss.cause
        self.incidents, self.incident = self.incidents + 1, said(each.name, loss.cause)
        self._tell("lost", component=each.name, pid=each.pid, node=each.node, cause=loss.cause, holds=held)
        if ending:
            self._say(f"{each.name} was lost while the run ended: {loss.cause}")
            return None
        delay_s = each.budget.spend(self._clock(), count=loss.count)
        if delay_s is None:
            each.enter("given up")
            self.incident = said(each.name, loss.cause, given_up=True)
            self._tell("given up", component=each.name, cause=loss.cause)
            raise loss.error or ComponentLost(self._given_up(each, loss))
        if each.name in self._lasting:
            delay_s = 0.0  # Ray is at it
        each.restarts += 1
        await self._lost(each.name)
        spent, most = each.budget.spent, self._config.restarts
        self._tell("restarting", component=each.name, in_s=delay_s, restart=spent, of=most)
        work = f"; {_few(held)} go to others" if held else ""
        self._say(
            f"{each.name} (process {each.pid or 'unknown'}) was lost: {loss.cause}{work}; restart {spent} of {most} "
            f"in {delay_s:.1f} s"
        )
        return delay_s

    async def _explained(self, each: Component, cause: str) -> str:
        """The cause of a loss, and whether the system ended processes for want of memory meanwhile."""
        if not each.pid or (found := await self._seen(each, "oom_kills")) is None:
            return cause
        kills, each.oom_kills = found - each.oom_kills, found
        if kills <= 0:
            return cause
        return (
            f"{cause}; meanwhile its machine ran out of memory, and the system ended {kills} of its processes: give "
            "the run more memory, or lower learner.token_budget, generation.slots or journal.cache_bytes"
        )

    def _given_up(self, each: Component, loss: Loss) -> str:
        config = self._config
        return (
            f"{each.name} (process {each.pid or 'unknown'}) was lost"
            + (f" again, after {each.restarts} restarts" if each.restarts else "")
            + f", and no restart is left of the {config.restarts} within {config.window_s:g} s (supervise.restarts, "
            f"supervise.window_s). The last cause: {loss.cause}. What is committed stays: mend the cause, then "
            "continue with --resume, or raise supervise.restarts"
        )

    async def _fence(self, each: Component, loss: Loss) -> Sequence[GroupId]:
        """Its leases end now, not when their time is over. Returns what it held."""
        if role_of(each.name) not in ("generation", "reward"):
            return []
        call = partial(self._queue.fence, each.name, cause=loss.fence, traceback=loss.cause)
        groups: Sequence[GroupId] = await self._answered(call, f"fencing {each.name}")
        return groups

    async def _attend(self, each: Component) -> None:
        """A component that Ray restarts: say when it is lost, and when it is back."""
        each.handle = each.make()
        while True:
            loss = await self._watch(each)
            each.lost_at = each.answered_at  # Ray may hold an unanswered call back until the next process is there
            await self._mourn(each, loss)
            lost_at, each.pid = self._clock(), 0
            while True:
                try:
                    each.node, each.pid = await asyncio.wait_for(each.handle.whereabouts(), self._config.start_s)
                    break
                except ConnectionRefusedError as caught:
                    raise ComponentLost(f"{caught}; continue with --resume when the cause is mended") from None
                except (ConnectionError, TimeoutError) as caught:
                    if self._clock() - lost_at > self._config.start_s:
                        raise ComponentLost(f"{each.name} did not come back: {caught}") from None
                await asyncio.sleep(AGAIN_S)
            self._serves(each)

    async def _answered(self, call: Callable[[], Awaitable[T]], what: str) -> T:
        return await persist(
            call,
            what=f"supervisor: {what}",
            remedy="Look at the queue's process and its machine.",
            deadline_s=self._config.start_s,
            clock=self._clock,
        )


def _unreachable(each: Component, error: ConnectionError) -> Loss:
    """What a constructor raises at the first start no restart mends; later it may be what the lost one has left."""
    if not isinstance(error, ConnectionRefusedError):
        return Loss(error.reason if isinstance(error, Gone) else str(error))
    if not each.restarts:
        raise ComponentLost(str(error)) from None
    return Loss(str(error), count=NOT_STARTED)


def _few(held: Sequence[str]) -> str:
    """Draws and their attempts, the first ones by number.

    >>> _few(["3/0"]), _few([f"{draw}/0" for draw in range(7, 15)])
    ('its draw 3/0', 'its 8 draws 7/0, 8/0, 9/0, 10/0, ...')
    """
    if len(held) == 1:
        return f"its draw {held[0]}"
    return f"its {len(held)} draws {', '.join(held[:4])}" + (", ..." if len(held) > 4 else "")


def _same(handle: Any) -> Any:
    return handle
