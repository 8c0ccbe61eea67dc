"""The generation worker: lease draws, generate groups, put them.

    consumes        leases (with their prompts and seeds), published weights
    waits for       the first announced version; then for room in its engine, and for admission
    unblocked by    a finished response, a step of the learner

Leasing, generating, putting and fetching weights are loops of their own: none waits for another's round trip.
"""

import asyncio
import time
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from typing import Any, TypeVar

from millrace.actors.adapters import whole_weights
from millrace.actors.config import GenerationConfig
from millrace.actors.engines import engine as build_engine
from millrace.actors.hand import Hand
from millrace.actors.weights import WeightReceiver
from millrace.core.calls import Bell, Outbox, persist, together
from millrace.core.errors import ConfigError, DeadlineError, EngineDeadError, EngineError, MillraceError
from millrace.core.failpoint import reach
from millrace.core.heart import Heart, Pulse
from millrace.core.protocols import Clock, Engine, Grant, Orders, Queue, Role, Sampling, WeightStore
from millrace.core.schema import encode
from millrace.core.types import Group, Lease, WorkerId

T = TypeVar("T")

WIRING = "millrace.actors.engines.wiring"  # imports torch and transformers, which not every engine needs
FETCH_AGAIN_S = 0.05
ROOM_S = 0.02  # between two looks at the slots that single responses left
WEIGHTS_SOON_S = 1.0
HEAR_S = 20.0  # a wait for newer weights at their store
GIVE_UP_S = 2.0  # on `stop`, for the engine and the queue to answer while everything in hand is given up
LEAVE_S = 0.5  # and then to tell the queue, before the worker goes without
TRACEBACK_BYTES = 4096


class GenerationWorker:
    """Generates what the queue leases to it, with the newest weights it can have."""

    def __init__(
        self,
        name: WorkerId,
        *,
        queue: Queue,
        store: WeightStore,
        engine: Engine | Mapping[str, Any],
        config: GenerationConfig,
        sampling: Sampling,
        clock: Clock = time.monotonic,
    ) -> None:
        """
        Args:
            queue: callable from any event loop: heartbeats come from a thread of their own.
            engine: built here from {"name": ..., **options}, so that the arguments can cross a machine.
        """
        if isinstance(engine, Mapping) and "name" not in engine:
            raise ConfigError(f'{name}: the engine has no name: write engine = {{ name = "vllm", ... }}')
        self._name = name
        self._queue = queue
        self._config = config
        self._clock = clock
        self._bell = Bell()  # rung when there is room, work, or the wish to stop
        self._engine: Engine = build_engine(**engine) if isinstance(engine, Mapping) else engine
        is_vllm = isinstance(engine, Mapping) and str(engine["name"]).startswith("vllm")
        self._to_check = engine if is_vllm and config.check_wiring else None
        self._receiver = WeightReceiver(self._engine, whole_weights(store, engine), probe_every=config.probe_every)
        self._hand = Hand(self._engine, sampling=sampling, changed=self._bell.ring)
        self._outbox = Outbox[Group](self._put, linger_s=config.linger_s, full=config.pack_groups)
        self._heart = Heart(
            name,
            read=self._hand.pulse,
            send=self._beat,
            obey=self._obey,
            every_s=config.heartbeat_s,
            deadline_s=config.silence_s,
            clock=clock,
        )
        self._epoch = -1
        self._requests = 0
        self._members = 0  # responses of a group, as last leased
        self._newest = -1
        self._announced = asyncio.Event()
        self._stopping = False
        self._told = asyncio.Event()  # to stop
        self._failures = 0  # in a row
        self._idle = "not started"
        self._counts = Counter({"lease_calls": 0, "put_calls": 0, "groups": 0, "refused": 0, "failed": 0})

    async def run(self) -> None:
        """Generate until the run needs no more or `stop` is called, then leave.

        Raises:
            DeadlineError: the queue, the store or a lease's weights did not come in time.
            WeightsError: the engine does not compute with what was published.
            EngineDeadError: the engine is gone, whatever it was doing, nothing included.
            EngineError: the engine fails group after group.
            Fenced: another incarnation of this worker has joined.
        """
        working = asyncio.create_task(self._work())
        watching = asyncio.create_task(self._engine.watch())
        tasks = (working, watching, asyncio.create_task(self._patience()))
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone = _failure(watching)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=LEAVE_S)
        failure = _failure(working) or gone
        if failure is not None:
            raise failure
        if self._epoch >= 0 and (working.cancelled() or not working.done()):
            with suppress(MillraceError, TimeoutError):
                async with asyncio.timeout(LEAVE_S):
                    await self._leave()

    async def stop(self) -> None:
        """Give up what is in hand, put what is finished, and leave; `run` returns when that is done.

        It returns in any case within `GIVE_UP_S` + `LEAVE_S`, whatever the engine and the queue are doing.
        """
        self._stopping = True
        self._told.set()
        self._bell.ring()

    async def close(self) -> None:
        """End the engine, once `run` has ended."""
        await self._engine.close()

    async def status(self) -> Mapping[str, Any]:
        """Counters, and what it waits for."""
        return {
            "version": self._engine.version,
            "generated": self._engine.generated,
            "aborted": self._engine.aborted,
            "loads": self._receiver.loads,
            "hand": len(self._hand),
            "unfinished": self._hand.unfinished,
            "most_unfinished": self._hand.most_unfinished,
            "abandoned": len(self._hand.abandoned),
            "heartbeats": self._heart.beats,
            "idle": self._idle,
            **self._counts,
        }

    async def _work(self) -> None:
        if isinstance(self._to_check, Mapping):
            model, dtype = self._to_check["model"], self._to_check.get("dtype", "float32")
            await import_module(WIRING).check_wiring(self._engine, model, dtype=dtype)
        self._epoch = await self._answered(
            lambda: self._queue.join(self._name, role=Role.GENERATION, slots=self._config.slots), "join"
        )
        try:
            async with together() as self._tasks:
                self._heart.start()
                loops = (self._heart.watch(), self._outbox.run(), self._follow(), self._hear())
                helpers = [self._tasks.create_task(loop) for loop in loops]
                await self._serve()
                await self._outbox.drain()
                for helper in helpers:
                    helper.cancel()
        finally:
            self._idle = "ended"
            await self._heart.stop()
        await self._leave()

    async def _patience(self) -> None:
        """Returns when `stop` was called and has had its time."""
        await self._told.wait()
        if self._epoch >= 0:  # before it has joined there is nothing to give up
            await asyncio.sleep(GIVE_UP_S)

    async def _leave(self) -> None:
        await self._answered(
            lambda: self._queue.leave(
                self._name, epoch=self._epoch, generated=self._engine.generated, abandoned=self._hand.abandoned
            ),
            "leave",
        )

    async def _serve(self) -> None:
        """Lease and start until the run is over or the worker is to stop; then give up what is in hand."""
        self._idle = "weights: no version was announced yet"
        await self._bell.until(lambda: self._engine.version >= 0 or self._stopping)
        while not self._stopping:
            self._idle = ""
            await self._room()
            grant = await self._lease(self._want())
            if grant is None:
                break
            self._hear_of(grant.newest_version)
            self._idle = grant.idle
            self._stopping = self._stopping or grant.finished
            for lease in grant.leases:
                self._members = lease.n
                self._hand.take(lease)
                self._tasks.create_task(self._generate(lease))
            if not grant.leases and grant.newest_version > self._engine.version:
                # Newer weights are what it waits for; ask again when they are there, or when they take long.
                await self._bell.until(lambda: self._engine.version >= self._newest or self._stopping, WEIGHTS_SOON_S)
        self._idle = "stopping"
        for key in self._hand.groups:
            await self._hand.give_up(key, "the worker was stopped")
        await self._bell.until(lambda: not self._hand)

    async def _room(self) -> None:
        """Wait until there is room for a request. A response of a group that goes on leaves its slot and rings no bell:
        for each bell the engine's thread would wait for this one."""
        while self._want() <= 0 and not self._stopping:
            await self._bell.until(lambda: self._want() > 0 or self._stopping, ROOM_S)

    async def _lease(self, want: int) -> Grant | None:
        """More draws; None when the worker is to stop meanwhile.

        Newer weights may be admitted where older ones are not, so a request that waits is repeated with them, under
        the same id: whichever call is granted first, the other gets the same leases.
        """
        request = self._request("lease")
        while not self._stopping:
            version = self._engine.version
            self._counts["lease_calls"] += 1
            polling = self._tasks.create_task(self._polled(want, version, request))
            polling.add_done_callback(lambda _: self._bell.ring())
            await self._bell.until(lambda: polling.done() or self._stopping or self._engine.version > version)  # noqa: B023
            if polling.done():
                return polling.result()
            polling.cancel()  # on stopping, what it may still be granted is taken back when the worker leaves
        return None

    async def _polled(self, want: int, version: int, request: str) -> Grant:
        return await self._answered(
            lambda: self._queue.lease_draws(
                self._name, epoch=self._epoch, version=version, want=want, request=request, wait_s=self._config.poll_s
            ),
            f"lease_draws of {want}",
            self._config.poll_s,
        )

    def _want(self) -> int:
        """Groups to ask for; none before so much room has come up that a request is worth its round trip."""
        if not self._members:
            return max(1, self._config.prefetch or 0)  # how large a group is, the first lease tells
        fill = -(-self._config.slots // self._members)
        ahead = max(1, fill // 2) if self._config.prefetch is None else self._config.prefetch
        if self._hand.unfinished > self._config.slots + ahead // 4 * self._members:
            return 0
        return ((fill + ahead) * self._members - self._hand.unfinished) // self._members

    async def _generate(self, lease: Lease) -> None:
        try:
            await self._reach(lease)
            reach("generation.generate.before")
            group = await self._hand.generate(lease.id)
            if group is not None:
                self._failures = 0
                self._outbox.put(group)
        except EngineDeadError:
            raise
        except EngineError as caught:
            await self._fail(lease, caught)
            self._counts["failed"] += 1
            self._failures += 1
            if self._failures >= self._config.max_engine_failures:
                raise EngineError(
                    f"{self._name}: {self._failures} groups in a row failed in the engine (max_engine_failures), the "
                    f"last is {lease.id} of prompt {lease.prompt.id!r}: {caught}"
                ) from caught
        finally:
            self._hand.drop(lease.id)
            if not self._hand:
                self._outbox.flush()

    async def _fail(self, lease: Lease, cause: EngineError) -> None:
        """End the lease at once: the draw goes on to another attempt, or is given up."""
        text = "".join(traceback.format_exception(cause)).encode()[-TRACEBACK_BYTES:].decode(errors="ignore")
        request = self._request("fail")
        await self._answered(
            lambda: self._queue.fail_groups(self._name, epoch=self._epoch, failures={lease.id: text}, request=request),
            f"fail_groups ({lease.id})",
        )

    async def _reach(self, lease: Lease) -> None:
        """No first token is sampled below the lease's version."""

        def ready() -> bool:
            return self._engine.version >= lease.min_version or self._hand.is_given_up(lease.id)

        await self._bell.until(ready, self._config.weights_s)
        if not ready():
            raise DeadlineError(
                f"{self._name}: {lease.id} waits for version {lease.min_version} of the weights for "
                f"{self._config.weights_s:g} s (weights_s); the engine holds {self._engine.version}, announced was "
                f"{self._newest}: look at the weight store and at the learner that publishes into it"
            )

    async def _put(self, groups: Sequence[Group]) -> None:
        pack, request = encode(groups), self._request("put")
        draws = ", ".join(str(group.id) for group in groups[:4]) + (" ..." if len(groups) > 4 else "")
        self._counts["put_calls"] += 1
        reach("generation.put.before")
        receipts = await self._answered(
            lambda: self._queue.put_groups(self._name, epoch=self._epoch, pack=pack, request=request),
            f"put_groups ({draws})",
        )
        for receipt in receipts:
            self._counts["groups" if receipt.accepted else "refused"] += 1
            self._hand.answered(receipt.id, accepted=receipt.accepted)

    async def _follow(self) -> None:
        """Fetch and swap in what is announced, while generations run."""
        while True:
            await self._announced.wait()
            self._announced.clear()
            what = f"weights of version {self._newest}"
            await self._answered(lambda: self._receiver.follow(self._newest), what, self._config.weights_s)
            self._bell.ring()
            if self._engine.version < self._newest:  # announced, but this machine's store does not hold it yet
                await asyncio.sleep(FETCH_AGAIN_S)
                self._announced.set()

    async def _hear(self) -> None:
        """Hear of weights as soon as they are published: a busy worker has no request open that would tell it."""
        while True:
            wait = partial(self._receiver.hear, wait_s=HEAR_S)
            self._hear_of(await self._answered(wait, "newer weights", HEAR_S))

    async def _beat(self, pulse: Pulse) -> Orders:
        return await self._queue.heartbeat(
            self._name, epoch=self._epoch, progress=pulse.progress, generated=pulse.generated
        )

    def _obey(self, orders: Orders) -> None:
        self._hear_of(orders.newest_version)
        for key in orders.fenced:
            if key in self._hand.groups:
                self._tasks.create_task(self._hand.give_up(key, "its lease has ended"))
        if orders.stop:
            self._stopping = True
            self._bell.ring()

    def _hear_of(self, version: int) -> None:
        if version > self._newest:
            self._newest = version
            self._announced.set()

    async def _answered(self, call: Callable[[], Awaitable[T]], what: str, waits_s: float = 0.0) -> T:
        return await persist(
            call,
            what=f"{self._name}: {what}",
            remedy=f"Look at the queue, the weight store and their machines; silence_s = {self._config.silence_s:g} "
            "sets how long a worker waits for them.",
            deadline_s=self._config.silence_s + waits_s,
            clock=self._clock,
        )

    def _request(self, what: str) -> str:
        self._requests += 1
        return f"{self._name}/{self._epoch}/{what}/{self._requests}"


def _failure(task: "asyncio.Task[None]") -> BaseException | None:
    return task.exception() if task.done() and not task.cancelled() else None
