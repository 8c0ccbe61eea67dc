"""vLLM in child processes, for engines that span GPUs: the same protocol over `AsyncLLM`.

The engine core runs in a process of its own and starts one worker process per GPU. All of them end with this process,
and the engine with each of them (see processes): vLLM itself leaves orphans, and calls that are never answered.
"""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError as VllmDeadError

from millrace.actors.engines.processes import Processes
from millrace.actors.engines.pump import check_call
from millrace.actors.engines.vllm import VllmOptions, check_load, engine_arguments, sampling_params, tensor_rows
from millrace.actors.engines.vllm_weights import request_id
from millrace.actors.weights import check_digest, probe_gap
from millrace.core.errors import EngineDeadError, EngineError, WeightsError, boundary
from millrace.core.protocols import Manifest, Proof, Sampling, WeightHandle
from millrace.core.types import Floats, Ints, Rollout, VersionRun
from millrace.core.weights import VersionGoneError

R = TypeVar("R")

_SCORE = "score"
_ABORT_AGAIN_S = 0.005
_DEATH_S = 1.0  # for the watch to see a process end, after vLLM has


class VllmAsyncEngine:
    """`core.protocols.Engine` over vLLM's `AsyncLLM`. Belongs to the event loop of its first call.

    Args:
        model: directory of a Hugging Face checkpoint.
        slots: sequences generated at the same time.
        max_model_len: tokens of prompt and response together.
        dtype: "float32", "bfloat16" or "float16".
        seed: of vLLM's own generators; rollouts take theirs from the call.
        options: see `VllmOptions`.

    Raises:
        EngineError: vLLM does not start.
    """

    def __init__(
        self, model: str, *, slots: int, max_model_len: int, dtype: str = "float32", seed: int = 0, **options: Any
    ) -> None:
        self._options = VllmOptions.parse(options, source="engine vllm_async")
        arguments = engine_arguments(model, slots, max_model_len, dtype, seed, self._options)
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        self._processes = Processes()
        try:
            with boundary("vllm_async engine: its start", EngineError), self._processes.starting():
                self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments, disable_log_stats=True))
        except EngineError:
            self._processes.close()
            raise
        self._watching = False
        self._death = ""  # what happened to vLLM's processes
        self._dead = asyncio.Event()
        self._llm.output_processor.process_outputs = self._counting(self._llm.output_processor.process_outputs)
        self._vocabulary: int = self._llm.model_config.get_vocab_size()
        self._max_model_len = max_model_len
        self._version = -1
        self._loading = asyncio.Lock()
        self._preparing: asyncio.Task[None] | None = None
        self._calls: dict[str, list[str]] = {}  # key -> ids of its requests
        self._finished: dict[str, int] = {}  # tokens of requests that ended, of running calls
        self._ending: set[asyncio.Task[Any]] = set()
        self._numbers = 0
        self._generated = 0
        self.aborted = 0  # tokens of responses that were given up

    async def sample(self, tokens_P: Ints, *, sampling: Sampling, seeds: Sequence[int], key: str) -> Sequence[Rollout]:
        """See `core.protocols.Engine.sample`."""
        check_call(
            tokens_P, sampling, seeds, key, self._calls, max_model_len=self._max_model_len, vocabulary=self._vocabulary
        )
        names = [request_id(self._number(), seed) for seed in seeds]
        self._calls[key] = names
        call = asyncio.create_task(self._sample(tokens_P.tolist(), sampling, seeds, names, key))
        try:
            # Shielded: a cancelled caller's requests are aborted in vLLM, and their tokens still counted.
            return await asyncio.shield(call)
        except asyncio.CancelledError:
            for task in (call, asyncio.create_task(self.abort(key))):
                self._ending.add(task)
                task.add_done_callback(self._ended)
            raise

    async def load(self, weights: WeightHandle, *, prove: bool) -> Proof:
        """See `core.protocols.Engine.load`. Requests in flight are kept; see the option `prefix_cache`."""
        return await self._alive(self._load(weights, prove=prove), f"load of version {weights.manifest.version}")

    async def _load(self, weights: WeightHandle, *, prove: bool) -> Proof:
        await self._prepared()
        async with self._loading:
            manifest = weights.manifest
            digest = await asyncio.to_thread(check_digest, weights)
            started = time.perf_counter()
            # Not `pause_generation`: it sleeps 20 ms for an order of events that nobody here needs.
            await self._llm.engine_core.pause_scheduler_async(
                mode="keep", clear_cache=self._options.prefix_cache == "recompute"
            )
            try:
                consumed = await self._load_buffer(weights)
                await self._llm.update_weight_version(str(manifest.version))
            finally:
                if not self._dead.is_set():
                    await self._llm.resume_generation()
            pause_s = time.perf_counter() - started
            self._version = manifest.version
            gap = await probe_gap(manifest, self._score, longest=self._max_model_len - 1) if prove else None
            return Proof(version=manifest.version, digest=digest, consumed=consumed, probe_gap=gap, pause_s=pause_s)

    async def score(self, tokens_T: Ints) -> Floats:
        """See `core.protocols.Engine.score`. Waits for a running `load`, so that one version scores all tokens."""

        async def scored() -> Floats:
            await self._prepared()
            async with self._loading:
                return await self._score(tokens_T)

        return await self._alive(scored(), "score")

    async def abort(self, key: str) -> None:
        """See `core.protocols.Engine.abort`."""
        names = self._calls.get(key)
        while names is not None and self._calls.get(key) is names:
            await self._alive(self._llm.abort(names), f"abort of '{key}'")
            await asyncio.sleep(_ABORT_AGAIN_S)  # vLLM does not know a request yet while it validates it

    @property
    def version(self) -> int:
        """Of the weights it holds; -1 before the first load."""
        return self._version

    @property
    def generated(self) -> int:
        """All response tokens it ever sampled, counted as they arrive from the engine core."""
        return self._generated

    def progress(self) -> Mapping[str, int]:
        """Tokens sampled so far, by key of the running calls."""
        return {key: sum(map(self._tokens_of, names)) for key, names in self._calls.items()}

    @property
    def unfinished(self) -> int:
        """Responses of the running calls that go on."""
        return sum(name not in self._finished for names in self._calls.values() for name in names)

    async def watch(self) -> None:
        """See `core.protocols.Engine.watch`."""
        await self._alive(asyncio.Event().wait(), "idle")

    async def close(self) -> None:
        """Give up what runs and end vLLM's processes."""
        with suppress(EngineDeadError):
            for key in list(self._calls):
                await self.abort(key)
        if self._ending:
            await asyncio.wait(self._ending, timeout=5)
        self._llm.shutdown()
        self._processes.close()

    async def _sample(
        self, prompt: list[int], sampling: Sampling, seeds: Sequence[int], names: list[str], key: str
    ) -> Sequence[Rollout]:
        async def outputs_of() -> list[Any]:
            await self._prepared()
            return await asyncio.gather(
                *(self._one(prompt, sampling, seed, name) for seed, name in zip(seeds, names, strict=True))
            )

        try:
            with boundary(f"sample '{key}': vLLM", EngineError):
                outputs = await self._alive(outputs_of(), f"sample '{key}'")
        finally:
            del self._calls[key]
            tokens = sum(self._finished.pop(name, 0) for name in names)
        if any(output.finish_reason == "abort" for output in outputs):
            self.aborted += tokens
            raise EngineError(f"sample '{key}' was aborted after {tokens} tokens")
        return tuple(_rollout(output, seed) for output, seed in zip(outputs, seeds, strict=True))

    async def _one(self, prompt: list[int], sampling: Sampling, seed: int, name: str) -> Any:
        params = sampling_params(sampling)
        params.seed = seed
        final: Any = None
        async for output in self._llm.generate({"prompt_token_ids": prompt}, params, name):
            final = output.outputs[0]
        self._finished[name] = len(final.token_ids)
        return final

    async def _score(self, tokens_T: Ints) -> Floats:
        if len(tokens_T) < 2:
            return np.zeros(0, np.float32)
        if len(tokens_T) >= self._max_model_len:
            raise EngineError(
                f"score: {len(tokens_T)} tokens, max_model_len = {self._max_model_len}: vLLM scores prompts that are "
                "shorter, because it samples one token after them"
            )
        tokens = tokens_T.tolist()
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False, ignore_eos=True)
        final: Any = None
        name = f"{_SCORE}-{self._number()}"
        async for output in self._llm.generate({"prompt_token_ids": tokens}, params, name, priority=-1):
            final = output
        steps = zip(final.prompt_logprobs[1:], tokens[1:], strict=True)
        return np.array([row[token].logprob for row, token in steps], np.float32)

    async def _load_buffer(self, weights: WeightHandle) -> frozenset[str]:
        manifest: Manifest = weights.manifest
        try:
            with boundary(f"vLLM: loading version {manifest.version}", WeightsError):
                answers = await self._llm.collective_rpc("load_buffer", args=(weights.path, tensor_rows(manifest)))
        except WeightsError:
            if not Path(weights.path).exists():
                raise VersionGoneError(f"{weights.path} was deleted before it was mapped: fetch again") from None
            raise
        return check_load(manifest, [(list(consumed), list(unset)) for consumed, unset in answers])

    async def _alive(self, call: Awaitable[R], what: str) -> R:
        """The call's answer; vLLM owes it for ever once one of its processes is gone.

        Raises:
            EngineDeadError: at once when that happens. The call is left alone.
        """
        if not self._watching:
            self._watching = True
            self._processes.watch(partial(self._died, asyncio.get_running_loop()))
        answer, dead = asyncio.ensure_future(call), asyncio.ensure_future(self._dead.wait())
        try:
            await asyncio.wait((answer, dead), return_when=asyncio.FIRST_COMPLETED)
            if not self._dead.is_set() and isinstance(_failure(answer), VllmDeadError):
                await asyncio.wait((dead,), timeout=_DEATH_S)  # says which process, and how
            if self._dead.is_set() or isinstance(_failure(answer), VllmDeadError):
                raise EngineDeadError(
                    f"{what}: vLLM's {self._death or 'engine process failed'}: start the worker again; the kernel's "
                    "log says whether memory ran out"
                )
            return answer.result()
        finally:
            for task in (answer, dead):
                if not task.done():
                    task.cancel()
                    self._ending.add(task)
                task.add_done_callback(self._ended)

    def _died(self, loop: asyncio.AbstractEventLoop, what: str) -> None:
        self._death = what
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(self._dead.set)

    async def _prepared(self) -> None:
        if self._preparing is None:
            self._preparing = asyncio.create_task(self._prepare())
        await asyncio.shield(self._preparing)

    async def _prepare(self) -> None:
        with boundary("vllm_async engine: its workers", EngineError):
            await self._llm.collective_rpc("draw_by_position")
            await self._llm.update_weight_version("-1")

    def _counting(self, process: Callable[..., Any]) -> Callable[..., Any]:
        """vLLM's output processing, with every token of every response counted before anything is dropped."""
        states = self._llm.output_processor.request_states

        def count(outputs: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
            for output in outputs:
                if not output.request_id.startswith(_SCORE):
                    self._generated += len(output.new_token_ids)
                    if output.request_id not in states:  # on its way when the request was aborted
                        self.aborted += len(output.new_token_ids)
            return process(outputs, *args, **kwargs)

        return count

    def _tokens_of(self, name: str) -> int:
        processor = self._llm.output_processor
        running = (processor.request_states.get(internal) for internal in processor.external_req_ids.get(name, ()))
        tokens: int = sum(state.detokenizer.num_output_tokens() for state in running if state)
        return self._finished.get(name, 0) + tokens

    def _ended(self, task: "asyncio.Task[Any]") -> None:
        self._ending.discard(task)
        if not task.cancelled():
            task.exception()  # seen: the call that would have raised it was cancelled

    def _number(self) -> int:
        self._numbers += 1
        return self._numbers


def _failure(task: "asyncio.Future[Any]") -> BaseException | None:
    return task.exception() if task.done() and not task.cancelled() else None


def _rollout(output: Any, seed: int) -> Rollout:
    tokens = list(output.token_ids)
    return Rollout(
        tokens_T=np.array(tokens, np.int32),
        sampled_T=np.ones(len(tokens), np.bool_),
        behaviour_logprob_T=np.array(
            [row[token].logprob for row, token in zip(output.logprobs, tokens, strict=True)], np.float32
        ),
        versions=tuple(VersionRun(int(span.version), span.start, span.end) for span in output.weight_versions),
        finish_reason=str(output.finish_reason),
        seed=seed,
    )
