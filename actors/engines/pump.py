"""One thread that steps an engine while it has work, and an event loop that never waits for it.

The thread owns the engine: requests, aborts and weight swaps are handed over between two steps, and what a step
finished goes back to the event loop in one call.
"""

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable, Container, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from millrace.core.errors import EngineDeadError, EngineError, MillraceError, boundary
from millrace.core.protocols import Sampling
from millrace.core.types import Ints, Rollout, VersionRun


@dataclass(slots=True)
class Response:
    """One sequence in the making. The engine's thread writes it."""

    call: "Call"
    number: int  # unique in an engine's life
    seed: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    starts: list[tuple[int, int]] = field(default_factory=list)  # (version, its first token)
    finish_reason: str = ""

    def append(self, token: int, logprob: float, version: int) -> None:
        """One sampled token."""
        if not self.starts or self.starts[-1][0] != version:
            self.starts.append((version, len(self.tokens)))
        self.tokens.append(token)
        self.logprobs.append(logprob)

    def finish_if_done(self) -> None:
        """Set the finish reason when the last token was a stop token, or the limit is reached."""
        sampling = self.call.sampling
        if self.tokens[-1] in sampling.stop_token_ids:
            self.finish_reason = "stop"
        elif len(self.tokens) >= sampling.max_tokens:
            self.finish_reason = "length"

    def rollout(self) -> Rollout:
        """What the engine sampled, as data."""
        ends = [start for _, start in self.starts[1:]] + [len(self.tokens)]
        return Rollout(
            tokens_T=np.array(self.tokens, np.int32),
            sampled_T=np.ones(len(self.tokens), np.bool_),
            behaviour_logprob_T=np.array(self.logprobs, np.float32),
            versions=tuple(
                VersionRun(version, start, end) for (version, start), end in zip(self.starts, ends, strict=True)
            ),
            finish_reason=self.finish_reason,
            seed=self.seed,
        )


@dataclass(slots=True, eq=False)
class Call:
    """One `sample`: a prompt and as many responses as seeds."""

    key: str
    prompt: list[int]
    sampling: Sampling
    loop: asyncio.AbstractEventLoop
    done: asyncio.Future[None]
    responses: list[Response] = field(default_factory=list)
    pending: int = 0

    @property
    def tokens(self) -> int:
        """Sampled so far, all responses together."""
        return sum(len(response.tokens) for response in self.responses)


class Core(Protocol):
    """What a pump steps. Every method runs on the pump's thread."""

    vocabulary: int  # V: prompt tokens at or above it are refused

    @property
    def busy(self) -> bool:
        """Whether a step would do something."""
        ...

    def add(self, call: Call) -> None: ...

    def abort(self, responses: Sequence[Response]) -> None: ...

    def step(self) -> Sequence[Response]:
        """Sample the next token of every running response; returns those that finished."""
        ...

    def close(self) -> None: ...


C = TypeVar("C", bound=Core)
R = TypeVar("R")


class Pump(Generic[C]):
    """Drives a core.

    Args:
        start: builds the core; runs on the pump's thread, because engines bind to the thread that made them.
        name: of the engine, for messages.
        max_model_len: tokens of prompt and response together.
    """

    def __init__(self, start: Callable[[], C], *, name: str, max_model_len: int) -> None:
        self._name = name
        self._max_model_len = max_model_len
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._inbox: deque[Callable[[], None]] = deque()
        self._lock = threading.Lock()
        self._running = False
        self._calls: dict[str, Call] = {}
        self._waiting: set[asyncio.Future[Any]] = set()
        self._numbers = 0
        self._broken: MillraceError | None = None
        self.aborted = 0  # tokens of responses that were given up
        try:
            self.core: C = self._thread.submit(self._start, start).result()
            self.vocabulary = self.core.vocabulary
        except MillraceError:
            self._thread.shutdown()
            raise

    def _start(self, start: Callable[[], C]) -> C:
        with boundary(f"{self._name} engine: its start", EngineError):
            return start()

    async def sample(self, tokens_P: Ints, *, sampling: Sampling, seeds: Sequence[int], key: str) -> Sequence[Rollout]:
        """See `core.protocols.Engine.sample`."""
        if self._broken is not None:
            raise self._gone(f"sample '{key}': ")
        check_call(
            tokens_P,
            sampling,
            seeds,
            key,
            self._calls,
            max_model_len=self._max_model_len,
            vocabulary=self.vocabulary,
        )
        loop = asyncio.get_running_loop()
        call = Call(key=key, prompt=tokens_P.tolist(), sampling=sampling, loop=loop, done=loop.create_future())
        for seed in seeds:
            call.responses.append(Response(call, self._numbers, seed))
            self._numbers += 1
        call.pending = len(call.responses)
        if not call.pending:
            return ()
        self._calls[key] = call
        self._post(lambda: self._admit(call))
        try:
            await call.done
        except asyncio.CancelledError:
            with contextlib.suppress(EngineError):  # a broken engine runs nothing any more
                self._post(lambda: self._give_up(call))
            raise
        finally:
            del self._calls[key]
        return tuple(response.rollout() for response in call.responses)

    async def between(self, work: Callable[[], R]) -> R:
        """Run `work` on the engine's thread between two steps."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[R] = loop.create_future()

        def run() -> None:
            try:
                with boundary(f"{self._name} engine", EngineError):
                    result = work()
            except MillraceError as caught:
                _settle_later(loop, [(done, caught)])
            else:
                loop.call_soon_threadsafe(_answer, done, result)

        self._post(run)
        self._waiting.add(done)
        try:
            return await done
        finally:
            self._waiting.discard(done)

    async def answered(self, work: Callable[[], "Future[R]"]) -> R:
        """Start `work` between two steps and wait for the future that it returns, which later steps settle."""
        return await self.settled(await self.between(work))

    async def settled(self, future: "Future[R]") -> R:
        """Wait for a future that a step settles; the engine's end settles it too."""
        return await self._until_gone(asyncio.wrap_future(future))

    async def watch(self) -> None:
        """See `core.protocols.Engine.watch`: a step that fails ends the engine, whoever's it was."""
        await self._until_gone(asyncio.get_running_loop().create_future())

    async def abort(self, key: str) -> None:
        """Give up a running `sample`; unknown keys are ignored, because it may just have finished."""
        call = self._calls.get(key)
        if call is not None:
            await self.between(lambda: self._give_up(call))

    def progress(self) -> Mapping[str, int]:
        """Tokens sampled so far, by key of the running calls."""
        return {key: call.tokens for key, call in self._calls.items()}

    @property
    def unfinished(self) -> int:
        """Responses of the running calls that go on."""
        return sum(call.pending for call in self._calls.values())

    async def close(self) -> None:
        """Give up what runs and end the engine."""
        for key in list(self._calls):
            await self.abort(key)
        if self._broken is None:
            await self.between(self.core.close)
            self._broken = EngineError(f"{self._name} engine: it was closed")
        self._thread.shutdown(wait=True)

    async def _until_gone(self, future: "asyncio.Future[R]") -> R:
        self._waiting.add(future)
        try:
            if self._broken is not None:  # in a step before the line above
                raise self._gone()
            return await future
        finally:
            self._waiting.discard(future)

    def _gone(self, what: str = "") -> MillraceError:
        """A new error for each who asks, because tracebacks grow on the one that is raised."""
        assert self._broken is not None
        return type(self._broken)(f"{what}{self._broken}")

    def _post(self, work: Callable[[], None]) -> None:
        with self._lock:
            if self._broken is not None:
                raise self._gone()
            self._inbox.append(work)
            if not self._running:
                self._running = True
                self._thread.submit(self._run).add_done_callback(self._ran)

    def _run(self) -> None:
        while self._advance():
            pass

    def _ran(self, run: "Future[None]") -> None:
        cause = run.exception()
        if cause is not None:
            self._break(cause)

    def _admit(self, call: Call) -> None:
        """A call that the core refuses fails alone."""
        try:
            with boundary(f"sample '{call.key}': the {self._name} engine", EngineError):
                self.core.add(call)
        except MillraceError as caught:
            self._give_up(call, caught)

    def _advance(self) -> bool:
        with boundary(f"{self._name} engine: a step", EngineError):
            while self._inbox:
                self._inbox.popleft()()
            if self.core.busy:
                self._finish(self.core.step())
                return True
        with self._lock:
            self._running = bool(self._inbox)
            return self._running

    def _finish(self, finished: Sequence[Response]) -> None:
        done: list[Call] = []
        for response in finished:
            response.call.pending -= 1
            if not response.call.pending:
                done.append(response.call)
        for loop in {call.loop for call in done}:
            _settle_later(loop, [(call.done, None) for call in done if call.loop is loop])

    def _give_up(self, call: Call, why: MillraceError | None = None) -> None:
        if call.pending <= 0:
            return  # it finished before the abort arrived
        self.core.abort([response for response in call.responses if not response.finish_reason])
        call.pending = 0
        self.aborted += call.tokens
        error = why or EngineError(f"sample '{call.key}' was aborted after {call.tokens} tokens")
        _settle_later(call.loop, [(call.done, error)])

    def _break(self, cause: BaseException) -> None:
        said = (
            str(cause) if isinstance(cause, MillraceError) else f"{self._name} engine: {type(cause).__name__}: {cause}"
        )
        with self._lock:
            self._broken = EngineDeadError(f"{said}. It takes no further calls: start the worker again")
            self._inbox.clear()
        for future in [call.done for call in list(self._calls.values())] + list(self._waiting):
            _settle_later(future.get_loop(), [(future, self._gone())])


def check_call(
    tokens_P: Ints,
    sampling: Sampling,
    seeds: Sequence[int],
    key: str,
    running: Container[str],
    *,
    max_model_len: int,
    vocabulary: int,
) -> None:
    """Refuse what no engine could sample, before it meets what else runs in the engine.

    Raises:
        EngineError: the prompt is empty, too long or of another vocabulary, a seed is none, or the key is in use.
    """
    if key in running:
        raise EngineError(f"sample '{key}' is already running: keys of running calls are unique")
    if not len(tokens_P):
        raise EngineError(f"sample '{key}': the prompt is empty: give at least one token, usually the BOS token")
    if tokens_P.ndim != 1 or tokens_P.dtype.kind not in "iu":
        raise EngineError(
            f"sample '{key}': the prompt is {tokens_P.dtype} of shape {tokens_P.shape}: give one row of token ids"
        )
    if sampling.max_tokens < 1:
        raise EngineError(f"sample '{key}': max_tokens = {sampling.max_tokens}: ask for at least one token")
    if odd := [seed for seed in seeds if not 0 <= seed < 2**63]:
        raise EngineError(f"sample '{key}': seed {odd[0]}: seeds lie in 0 .. 2**63 - 1")
    if len(tokens_P) + sampling.max_tokens > max_model_len:
        raise EngineError(
            f"sample '{key}': {len(tokens_P)} prompt tokens + max_tokens = {sampling.max_tokens} exceed "
            f"max_model_len = {max_model_len}: shorten the prompt, lower max_tokens or raise max_model_len"
        )
    if not 0 <= int(tokens_P.min()) <= int(tokens_P.max()) < vocabulary:
        raise EngineError(
            f"sample '{key}': prompt tokens {int(tokens_P.min())}..{int(tokens_P.max())} are outside the model's "
            f"vocabulary of {vocabulary}: the prompt was tokenised with another tokenizer"
        )


def _settle_later(
    loop: asyncio.AbstractEventLoop, outcomes: Sequence[tuple["asyncio.Future[Any]", MillraceError | None]]
) -> None:
    with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits any more
        loop.call_soon_threadsafe(_settle, outcomes)


def _settle(outcomes: Sequence[tuple["asyncio.Future[Any]", MillraceError | None]]) -> None:
    for future, error in outcomes:
        if not future.done():
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)


def _answer(future: "asyncio.Future[R]", result: R) -> None:
    if not future.done():
        future.set_result(result)
