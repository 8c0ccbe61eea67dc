"""vLLM inside the actor's own process: no child process, no serialisation, weights mapped straight from disk.

Consumes: calls of `sample`, `score` and `load`. Every touch of vLLM happens on the pump's thread, between two steps
or as a step. Tokens are read from the scheduler's own outputs, so vLLM's detokeniser and per-token dictionaries are
never built.
"""

import asyncio
import logging
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from copy import copy
from typing import Any, Literal

import numpy as np
from pydantic import Field
from vllm import EngineArgs, SamplingParams
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.executor import Executor

from millrace.actors.engines import vllm_kernels
from millrace.actors.engines.pump import Call, Pump, Response
from millrace.actors.engines.vllm_weights import TensorRow, request_id
from millrace.actors.weights import check_digest, check_names, check_probes
from millrace.core.config import Config
from millrace.core.errors import EngineError, WeightsError, boundary
from millrace.core.protocols import Manifest, Proof, Sampling, WeightHandle
from millrace.core.types import Floats, Ints, Rollout

EXTENSION = "millrace.actors.engines.vllm_weights.WorkerExtension"


class VllmOptions(Config):
    """What the vLLM engines take beside the common arguments."""

    prefix_cache: Literal["recompute", "keep"] = "recompute"
    """Keys and values of tokens in flight at a weight swap: computed again, or kept as they are."""
    kv_cache_gib: float = Field(default=1.0, gt=0)
    """Memory of the KV cache on a CPU, GiB."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """Share of a GPU's memory for weights and KV cache."""
    tensor_parallel_size: int = Field(default=1, ge=1)
    """GPUs that share every layer."""
    enforce_eager: bool | None = None
    """No compilation and no CUDA graphs. None: on a CPU only."""
    max_num_batched_tokens: int | None = None
    """Tokens of one step; None: vLLM's default."""
    quiet: bool = True
    """Silence vLLM's log below errors."""


def engine_arguments(model: str, slots: int, max_model_len: int, dtype: str, seed: int, options: VllmOptions) -> Any:
    """vLLM's arguments, as keywords of `EngineArgs` and `AsyncEngineArgs`."""
    on_cpu = current_platform.is_cpu()
    if options.quiet:
        logging.getLogger("vllm").setLevel(logging.ERROR)
    arguments: dict[str, Any] = {
        "model": model,
        "skip_tokenizer_init": True,
        "max_num_seqs": slots,
        "scheduling_policy": "priority",  # a probe does not queue behind the responses that wait for a slot
        "max_model_len": max_model_len,
        "dtype": dtype,
        "seed": seed,
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",  # nothing from the model directory changes how tokens are sampled
        "enforce_eager": on_cpu if options.enforce_eager is None else options.enforce_eager,
        "gpu_memory_utilization": options.gpu_memory_utilization,
        "tensor_parallel_size": options.tensor_parallel_size,
        "worker_extension_cls": EXTENSION,
        "use_tqdm_on_load": not options.quiet,
    }
    if on_cpu:
        arguments["async_scheduling"] = False
        arguments["ir_op_priority"] = vllm_kernels.priority()
        arguments["kv_cache_memory_bytes"] = int(options.kv_cache_gib * 2**30)
    if options.max_num_batched_tokens is not None:
        arguments["max_num_batched_tokens"] = options.max_num_batched_tokens
    return arguments


def sampling_params(sampling: Sampling) -> SamplingParams:
    """vLLM's form of `sampling`; stop tokens are exactly those named, the model's own EOS is not added."""
    return SamplingParams(
        temperature=sampling.temperature,
        max_tokens=sampling.max_tokens,
        stop_token_ids=list(sampling.stop_token_ids),
        ignore_eos=True,
        logprobs=0,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        skip_clone=True,
    )


def tensor_rows(manifest: Manifest) -> list[TensorRow]:
    """The manifest's tensors as plain tuples, which cross vLLM's process boundary."""
    return [(t.name, t.dtype, t.shape, t.offset, t.size) for t in manifest.tensors]


def check_load(manifest: Manifest, answers: Sequence[tuple[list[str], list[str]]]) -> frozenset[str]:
    """The names that every worker consumed.

    Raises:
        WeightsError: a worker left published parameters aside, or has parameters that nothing was loaded into.
    """
    for consumed, unset in answers:
        check_names(manifest, frozenset(consumed))
        if unset:
            raise WeightsError(
                f"version {manifest.version}: the engine's parameters {', '.join(unset[:5])} ({len(unset)} in all) "
                "were not set by any published tensor: publish every parameter of the model"
            )
    return frozenset(answers[0][0])


class VllmCore:
    """The stepped part: vLLM's engine core, its requests, its own count of tokens."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        config = EngineArgs(**arguments).create_engine_config()
        self._engine = LLMEngine(
            vllm_config=config,
            executor_class=Executor.get_class(config),
            log_stats=False,
            multiprocess_mode=False,
        )
        self._client = self._engine.engine_core
        self._core = self._client.engine_core
        self._client.set_weight_version("-1")
        self._by_position: bool = all(self._client.collective_rpc("draw_by_position"))
        self._running: dict[str, Response] = {}
        self._scores: dict[str, Future[Floats]] = {}
        self._finished: list[Response] = []
        self._params: dict[Sampling, SamplingParams] = {}
        self._numbers = 0
        self.generated = 0
        self.discarded = 0  # tokens that arrived after their request was aborted
        self.vocabulary: int = config.model_config.get_vocab_size()
        self._warm_up(config.scheduler_config.max_num_seqs, config.model_config.max_model_len)

    @property
    def busy(self) -> bool:
        """Whether a request is unfinished."""
        return bool(self._running or self._scores)

    def add(self, call: Call) -> None:
        """Queue one request per response, each with its own seed."""
        base = self._params.get(call.sampling)
        if base is None:
            base = self._params[call.sampling] = sampling_params(call.sampling)
        for response in call.responses:
            params = base
            if not self._by_position:
                params = copy(base)
                params.seed = response.seed
            name = request_id(response.number, response.seed)
            self._running[name] = response
            self._client.add_request(_request(name, call.prompt, params))

    def abort(self, responses: Sequence[Response]) -> None:
        """Forget these requests."""
        names = [request_id(response.number, response.seed) for response in responses]
        for name in names:
            self._running.pop(name, None)
        self._client.abort_requests(names)

    def step(self) -> Sequence[Response]:
        """One step of vLLM; returns the responses that finished."""
        self._collect(self._client.get_output())
        finished, self._finished = self._finished, []
        return finished

    def score(self, tokens: list[int]) -> "Future[Floats]":
        """Queue a prompt whose log-probabilities are wanted."""
        self._numbers += 1
        name = f"score-{self._numbers}"
        future = self._scores[name] = Future()
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False, ignore_eos=True)
        self._client.add_request(_request(name, tokens, params, priority=-1))
        return future

    def swap(self, weights: WeightHandle, *, recompute: bool) -> tuple[frozenset[str], float]:
        """Load weights between two steps. Returns the names consumed, and how long generation stood still, s."""
        started = time.perf_counter()
        self._drain()
        try:
            if recompute:
                self._client.reset_prefix_cache(reset_running_requests=True)
            manifest = weights.manifest
            with boundary(f"vLLM: loading version {manifest.version}", WeightsError):
                answers = self._client.collective_rpc("load_buffer", args=(weights.path, tensor_rows(manifest)))
            consumed = check_load(manifest, answers)
            self._client.set_weight_version(str(manifest.version))
        finally:
            self._core.resume_scheduler()
        return consumed, time.perf_counter() - started

    def close(self) -> None:
        """End vLLM."""
        self._client.shutdown()

    def _warm_up(self, slots: int, max_model_len: int) -> None:
        # Kernels are chosen and caches filled by the first batch; and a model whose kernels are missing fails here.
        limit = max(1, min(3, max_model_len - 1))
        params = sampling_params(Sampling(max_tokens=limit))
        prompt = [0] * max(1, min(16, max_model_len - limit))
        for number in range(min(slots, 64)):
            self._client.add_request(_request(f"warm-{number}", prompt, params))
        while self._core.scheduler.has_requests():
            self._collect(self._client.get_output())
        self.generated = self.discarded = 0

    def _drain(self) -> None:
        # With asynchronous scheduling one batch is still under way: its tokens belong to the old version.
        self._core.pause_scheduler(mode="keep", clear_cache=False)
        while self._core.batch_queue:
            self._collect(self._client.get_output())

    def _collect(self, outputs: Any) -> None:
        version = int(outputs.weight_version or -1)
        for output in outputs.outputs:
            response = self._running.get(output.request_id)
            if response is None:
                self._collect_score(output)
                continue
            tokens = output.new_token_ids
            self.generated += len(tokens)
            if tokens:
                logprobs = output.new_logprobs.logprobs
                for index, token in enumerate(tokens):
                    response.append(token, float(logprobs[index, 0]), version)
            if output.finish_reason is not None:
                response.finish_reason = str(output.finish_reason)
                del self._running[output.request_id]
                self._finished.append(response)

    def _collect_score(self, output: Any) -> None:
        future = self._scores.get(output.request_id)
        if future is None:
            self.generated += len(output.new_token_ids)
            self.discarded += len(output.new_token_ids)
            return
        if output.new_prompt_logprobs_tensors is not None:
            future.set_result(output.new_prompt_logprobs_tensors.logprobs[:, 0].numpy().astype(np.float32))
        if output.finish_reason is not None:
            del self._scores[output.request_id]
            if not future.done():
                future.set_exception(EngineError("vLLM ended a scored prompt without its log-probabilities"))


def _request(name: str, tokens: list[int], params: SamplingParams, *, priority: int = 0) -> EngineCoreRequest:
    return EngineCoreRequest(
        request_id=name,
        prompt_token_ids=tokens,
        mm_features=None,
        sampling_params=params,
        pooling_params=None,
        arrival_time=time.time(),
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
        priority=priority,
    )


class VllmEngine:
    """`core.protocols.Engine` over vLLM's `LLMEngine` in this process.

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
        self._options = VllmOptions.parse(options, source="engine vllm")
        arguments = engine_arguments(model, slots, max_model_len, dtype, seed, self._options)
        self._pump = Pump(lambda: VllmCore(arguments), name="vllm", max_model_len=max_model_len)
        self._core = self._pump.core
        self._max_model_len = max_model_len
        self._version = -1
        self._loading = asyncio.Lock()

    async def sample(self, tokens_P: Ints, *, sampling: Sampling, seeds: Sequence[int], key: str) -> Sequence[Rollout]:
        """See `core.protocols.Engine.sample`."""
        return await self._pump.sample(tokens_P, sampling=sampling, seeds=seeds, key=key)

    async def load(self, weights: WeightHandle, *, prove: bool) -> Proof:
        """See `core.protocols.Engine.load`. Only the swap itself stands between two steps."""
        async with self._loading:
            manifest = weights.manifest
            digest = await asyncio.to_thread(check_digest, weights)
            recompute = self._options.prefix_cache == "recompute"
            longest = self._max_model_len - 1
            probes = manifest.probes if prove and longest >= 2 else ()

            def swap() -> tuple[frozenset[str], float, list[Future[Floats]]]:
                consumed, pause_s = self._core.swap(weights, recompute=recompute)
                # Before the next step, which would fill the slots that a recomputation has just emptied.
                return consumed, pause_s, [self._core.score(probe.tokens_T[:longest].tolist()) for probe in probes]

            consumed, pause_s, scores = await self._pump.between(swap)
            self._version = manifest.version
            gap = check_probes(manifest, [await self._pump.settled(score) for score in scores]) if scores else None
            return Proof(version=manifest.version, digest=digest, consumed=consumed, probe_gap=gap, pause_s=pause_s)

    async def score(self, tokens_T: Ints) -> Floats:
        """See `core.protocols.Engine.score`. Waits for a running `load`, so that one version scores all tokens."""
        async with self._loading:
            return await self._score(tokens_T)

    async def abort(self, key: str) -> None:
        """See `core.protocols.Engine.abort`."""
        await self._pump.abort(key)

    @property
    def version(self) -> int:
        """Of the weights it holds; -1 before the first load."""
        return self._version

    @property
    def generated(self) -> int:
        """All response tokens it ever sampled, counted from the scheduler's outputs."""
        return self._core.generated

    @property
    def aborted(self) -> int:
        """Tokens of responses that were given up: generated = returned + aborted + in progress."""
        return self._pump.aborted + self._core.discarded

    def progress(self) -> Mapping[str, int]:
        """Tokens sampled so far, by key of the running calls."""
        return self._pump.progress()

    @property
    def unfinished(self) -> int:
        """Responses of the running calls that go on."""
        return self._pump.unfinished

    async def watch(self) -> None:
        """See `core.protocols.Engine.watch`."""
        await self._pump.watch()

    async def close(self) -> None:
        """Give up what runs and end vLLM."""
        await self._pump.close()

    async def _score(self, tokens_T: Ints) -> Floats:
        if len(tokens_T) < 2:
            return np.zeros(0, np.float32)
        if len(tokens_T) >= self._max_model_len:
            raise EngineError(
                f"score: {len(tokens_T)} tokens, max_model_len = {self._max_model_len}: vLLM scores prompts that are "
                "shorter, because it samples one token after them"
            )
        tokens = tokens_T.tolist()
        return await self._pump.answered(lambda: self._core.score(tokens))
