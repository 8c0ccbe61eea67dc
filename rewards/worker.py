"""The reward worker: lease generated groups, judge them, put verdicts.

    consumes        generated groups
    waits for       the generation workers, its verifier
    unblocked by    a put of groups, a verdict

It holds nothing: what it has in hand when it dies is judged again by another, not generated again.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from millrace.core.calls import Bell, Outbox, persist, together
from millrace.core.catalogue import Spec
from millrace.core.failpoint import reach
from millrace.core.heart import Heart, Pulse
from millrace.core.protocols import Clock, Orders, Queue, Role
from millrace.core.schema import decode
from millrace.core.types import Group, GroupId, GroupVerdict, Prompt, Rollout, Verdict, WorkerId
from millrace.rewards.config import JudgeConfig, RewardConfig
from millrace.rewards.decoding import decoder
from millrace.rewards.judge import Decode, Judge
from millrace.rewards.judge import verifier as resolved

T = TypeVar("T")

SLOW_S = 1.0  # a worker whose groups take longer holds few of them
FIRST_PAUSE_S = 0.01
EMPTY_PAUSE_S = 0.25
LEAVE_S = 1.0  # that a worker which stops waits for the queue, once for its verdicts and once for its farewell


@dataclass
class DeferredJudge:
    """A judge as data. It is built where it is first called: so it can be handed to an evaluator elsewhere."""

    verifier: Spec
    tokenizer: str
    columns: tuple[str, ...] = ()
    config: JudgeConfig = JudgeConfig()  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        self._judge: Judge | None = None

    async def __call__(self, prompt: Prompt, rollouts: Sequence[Rollout]) -> Sequence[Verdict]:
        if self._judge is None:
            method = resolved(self.verifier, columns=self.columns)
            self._judge = Judge(method, decode=decoder(self.tokenizer), config=self.config)
        return await self._judge(prompt, rollouts)

    def __reduce__(self) -> tuple[Any, ...]:
        return DeferredJudge, (self.verifier, self.tokenizer, self.columns, self.config)


@dataclass(slots=True)
class _Judging:
    """A group in hand."""

    since: float  # on the worker's clock
    made: int = 0  # verdicts


class RewardWorker:
    """Judges what the queue leases to it."""

    HOLDS_MANY = True  # objects, for as long as a verdict takes: its process goes through them for garbage rarely

    def __init__(
        self,
        name: WorkerId,
        *,
        queue: Queue,
        verifier: Spec,
        tokenizer: str | Decode,
        columns: Sequence[str] = (),
        config: RewardConfig,
        clock: Clock = time.monotonic,
    ) -> None:
        """
        Args:
            queue: callable from any event loop: heartbeats come from a thread of their own.
            verifier: resolved here, so that the arguments can cross a machine.
            tokenizer: a model directory, or what decodes.
            columns: further columns of the data, which the verifier may ask for.
        Raises:
            RewardError: the verifier cannot be imported, or asks for what the data lack.
            ModelError: the model directory has no tokenizer.
        """
        decode = decoder(tokenizer) if isinstance(tokenizer, str) else tokenizer
        self._name = name
        self._queue = queue
        self._config = config
        self._clock = clock
        self._bell = Bell()  # rung when there is room, work, or the wish to stop
        self._judge = Judge(resolved(verifier, columns=columns), decode=decode, config=config)
        self._outbox = Outbox[GroupVerdict](self._put, linger_s=config.linger_s, full=config.pack_groups)
        self._heart = Heart(
            name,
            read=self._read_pulse,
            send=self._beat,
            obey=self._obey,
            every_s=config.heartbeat_s,
            deadline_s=config.silence_s,
            clock=clock,
        )
        self._hand: dict[GroupId, _Judging] = {}  # the oldest first
        self._missing = 0  # verdicts, of all groups in hand
        self._judging: set[asyncio.Task[None]] = set()
        self._epoch = -1
        self._requests = 0
        self._was_slow = True  # the last group; until the first has shown otherwise
        self._members = 1  # responses of a group, as last leased
        self._pause_s = FIRST_PAUSE_S
        self._stopping = False
        self._counts = Counter({"lease_calls": 0, "put_calls": 0, "groups": 0, "refused": 0})

    async def run(self) -> None:
        """Judge until the run is over or `stop` is called, then leave.

        Raises:
            RewardError: the verifier fails again and again (`max_judge_failures`).
            DeadlineError: the queue has not answered for `silence_s`; or so many calls of the verifier hang in this
                process that only a new one can judge (`threads.Hanging`).
            Fenced: another incarnation of this worker has joined.
        """
        if not await self._joined():
            return
        try:
            async with together() as self._tasks:
                self._heart.start()
                helpers = [self._tasks.create_task(loop) for loop in (self._heart.watch(), self._outbox.run())]
                await self._serve()
                for task in (*self._judging, *helpers):
                    task.cancel()
        finally:
            await self._heart.stop()
        with suppress(TimeoutError):  # a queue that is down hears of it from the supervisor, or by the leases' end
            async with asyncio.timeout(LEAVE_S):
                await self._answered(
                    lambda: self._queue.leave(self._name, epoch=self._epoch, generated=0, abandoned={}), "leave"
                )

    async def stop(self) -> None:
        """Put what is judged, give back the rest, and leave; `run` returns when that is done."""
        self._stopping = True
        self._bell.ring()

    async def status(self) -> Mapping[str, Any]:
        """Counters; verdicts by kind; the first judge failure in full."""
        return {
            "hand": len(self._hand),
            "heartbeats": self._heart.beats,
            "verdicts": dict(self._judge.counts),
            "first_failure": self._judge.first_failure,
            **self._counts,
        }

    async def _joined(self) -> bool:
        """False when it was told to stop before the queue had answered."""
        joining = asyncio.ensure_future(
            self._answered(
                lambda: self._queue.join(self._name, role=Role.REWARD, slots=self._config.concurrency), "join"
            )
        )
        joining.add_done_callback(lambda _: self._bell.ring())
        try:
            await self._bell.until(lambda: joining.done() or self._stopping)
            if joining.done():
                self._epoch = joining.result()
            return joining.done()
        finally:
            joining.cancel()

    async def _serve(self) -> None:
        while not self._stopping:
            await self._bell.until(lambda: self._room() > 0 or self._stopping)
            if self._stopping:
                break
            groups = await self._lease(self._room())
            for group in groups:
                self._members = len(group.rollouts)
                if group.id in self._hand:
                    continue  # its lease ended before its verdict, and came back: the judging under way serves it
                self._hand[group.id] = _Judging(self._clock())
                self._missing += self._members
                task = self._tasks.create_task(self._judged(group))
                self._judging.add(task)
                task.add_done_callback(self._judging.discard)
            await self._let_gather(len(groups))
        with suppress(TimeoutError):  # what a queue that is down does not get is judged again
            async with asyncio.timeout(LEAVE_S):
                await self._outbox.drain()

    def _room(self) -> int:
        """Groups to ask for. One that waits for its last verdict takes the room of one verdict, not of a group."""
        most = self._config.groups
        if self._is_slow():
            most = 2 * -(-self._config.concurrency // self._members)
        return most - -(-self._missing // self._members)

    def _is_slow(self) -> bool:
        oldest = next(iter(self._hand.values()), None)
        return self._was_slow or (oldest is not None and self._clock() - oldest.since > SLOW_S)

    async def _lease(self, want: int) -> Sequence[Group]:
        request = self._request("lease")
        self._counts["lease_calls"] += 1
        polling = self._tasks.create_task(
            self._answered(
                lambda: self._queue.lease_groups(
                    self._name, epoch=self._epoch, want=want, request=request, wait_s=self._config.poll_s
                ),
                f"lease_groups of {want}",
                self._config.poll_s,
            )
        )
        polling.add_done_callback(lambda _: self._bell.ring())
        await self._bell.until(lambda: polling.done() or self._stopping)
        if not polling.done():
            polling.cancel()  # what it may still be granted goes back when the worker leaves
            return ()
        pack = polling.result()
        return decode(pack) if pack else ()

    async def _let_gather(self, got: int) -> None:
        """Wait so long that the next request finds about `pack_groups` groups; never longer than `linger_s`."""
        if not got:
            # An empty answer may come at once: when the run is over, or this worker is not to be asked again.
            await self._bell.until(lambda: self._stopping, EMPTY_PAUSE_S)
            return
        self._pause_s = min(self._pause_s * self._config.pack_groups / got, self._config.linger_s)
        if self._pause_s and not self._stopping:
            await asyncio.sleep(self._pause_s)
        self._pause_s = max(self._pause_s, FIRST_PAUSE_S)

    async def _judged(self, group: Group) -> None:
        its = self._hand[group.id]

        def one_more() -> None:
            its.made += 1
            self._missing -= 1
            self._bell.ring()

        try:
            verdicts = await self._judge(group.prompt, group.rollouts, one_more)
            self._was_slow = self._clock() - its.since > SLOW_S
            self._outbox.put(GroupVerdict(id=group.id, verdicts=verdicts))
        finally:
            del self._hand[group.id]
            self._missing -= len(group.rollouts) - its.made
            if not self._hand:
                self._outbox.flush()
            self._bell.ring()

    async def _put(self, verdicts: Sequence[GroupVerdict]) -> None:
        request = self._request("put")
        reach("reward.put.before")
        self._counts["put_calls"] += 1
        draws = ", ".join(str(one.id) for one in verdicts[:4]) + (" ..." if len(verdicts) > 4 else "")
        receipts = await self._answered(
            lambda: self._queue.put_verdicts(self._name, epoch=self._epoch, verdicts=verdicts, request=request),
            f"put_verdicts ({draws})",
        )
        for receipt in receipts:
            self._counts["groups" if receipt.accepted else "refused"] += 1

    async def _read_pulse(self) -> Pulse:
        return Pulse(progress={key: its.made for key, its in self._hand.items()})

    async def _beat(self, pulse: Pulse) -> Orders:
        return await self._queue.heartbeat(self._name, epoch=self._epoch, progress=pulse.progress, generated=0)

    def _obey(self, orders: Orders) -> None:
        if orders.stop:
            self._stopping = True
            self._bell.ring()

    async def _answered(self, call: Callable[[], Awaitable[T]], what: str, waits_s: float = 0.0) -> T:
        return await persist(
            call,
            what=f"{self._name}: {what}",
            remedy=f"Look at the queue's process and its machine; silence_s = {self._config.silence_s:g} sets how "
            "long a worker waits for it.",
            deadline_s=self._config.silence_s + waits_s,
            clock=self._clock,
        )

    def _request(self, what: str) -> str:
        self._requests += 1
        return f"{self._name}/{self._epoch}/{what}/{self._requests}"
