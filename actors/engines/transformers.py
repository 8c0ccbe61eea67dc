"""Continuous batching over a Hugging Face model, for machines where vLLM does not run, and for exactness tests.

Rows share one left-padded key-value cache. New requests are prefilled beside a decoding step and join the batch;
finished rows leave it. Weights change between two steps: with `prefix_cache = "recompute"` the next step rebuilds the
cache from the tokens, so that every later token is exactly what the new weights alone would sample.

A row's last bits depend on how many rows are computed with it, and on its padding. With `batch_invariant` each call is
a batch of its own, without padding: the same call gives the same bits, whatever runs beside it.
"""

import asyncio
import time
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import islice, takewhile
from typing import Any, Literal

import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from millrace.actors.engines.pump import Call, Pump, Response
from millrace.actors.engines.sampling import streams, uniform
from millrace.actors.weights import check_digest, check_names, probe_gap
from millrace.core.config import Config
from millrace.core.errors import WeightsError
from millrace.core.one_at_a_time import MODEL_LOADING
from millrace.core.protocols import Proof, Sampling, WeightHandle
from millrace.core.types import Floats, Ints, Rollout
from millrace.core.weights import map_file


class TransformersOptions(Config):
    """What the transformers engine takes beside the common arguments."""

    prefix_cache: Literal["recompute", "keep"] = "recompute"
    """Keys and values of tokens in flight at a weight swap: computed again, or kept as they are."""
    device: str | None = None
    """Where the model lives; None: the first GPU if there is one, else the CPU."""
    attention: str = "sdpa"
    """The model's attention implementation."""
    batch_invariant: bool = False
    """Every bit of a response depends on its call and the weights alone, so that what is sampled again after a crash
    is the same. Costs a forward pass per group and token."""


class Batch:
    """Rows that are computed together, in one left-padded cache."""

    def __init__(self, model: Any, device: str) -> None:
        self._model, self._device = model, device
        self._cache: Any = None
        self._mask_RT = torch.zeros(0, 0, dtype=torch.long)
        self.rows: list[Response] = []
        self.joining: list[Response] = []  # in the next step

    def __len__(self) -> int:
        return len(self.rows) + len(self.joining)

    def recompute(self) -> None:
        """The next step builds the cache again from the tokens."""
        self._cache = None

    def advance(self, version: int) -> int:
        """Sample the next token of every row, and the first of those that join. Returns how many were sampled."""
        joining, self.joining = self.joining, []
        if self._cache is None:
            self.rows, joining = self.rows + joining, []
            logits_RV, self._cache, self._mask_RT = self._prefill(self.rows)
        else:
            logits_RV = self._decode()
        if joining:
            new_logits_RV, cache, mask_RT = self._prefill(joining)
            self._merge(cache, mask_RT)
            self.rows = self.rows + joining
            logits_RV = torch.cat([logits_RV, new_logits_RV])
        self._sample(logits_RV, version)
        return len(self.rows)

    def keep(self, kept: Sequence[bool]) -> None:
        """Forget the other rows."""
        if all(kept):
            return
        self.rows = [response for response, keep in zip(self.rows, kept, strict=True) if keep]
        if self._cache is None or not self.rows:
            self._cache = None
            return
        index = torch.tensor([row for row, keep in enumerate(kept) if keep], device=self._device)
        self._mask_RT = self._mask_RT[index]
        first = int(self._mask_RT.any(dim=0).nonzero()[0])  # columns that no row needs any more
        self._mask_RT = self._mask_RT[:, first:]
        shrunk = DynamicCache()
        for number, layer in enumerate(self._cache.layers):
            shrunk.update(layer.keys[index, :, first:], layer.values[index, :, first:], number)
        self._cache = shrunk

    def _prefill(self, rows: Sequence[Response]) -> tuple[torch.Tensor, Any, torch.Tensor]:
        texts = [response.call.prompt + response.tokens for response in rows]
        longest = max(map(len, texts))
        ids_RT = torch.tensor([[0] * (longest - len(text)) + text for text in texts], device=self._device)
        mask_RT = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts], device=self._device)
        cache = DynamicCache()
        positions_RT = (mask_RT.cumsum(1) - 1).clamp(min=0)
        return self._forward(ids_RT, mask_RT, positions_RT, cache), cache, mask_RT

    def _decode(self) -> torch.Tensor:
        ids_RT = torch.tensor([[response.tokens[-1]] for response in self.rows], device=self._device)
        self._mask_RT = torch.cat([self._mask_RT, torch.ones_like(ids_RT)], dim=1)
        return self._forward(ids_RT, self._mask_RT, self._mask_RT.sum(1, keepdim=True) - 1, self._cache)

    def _forward(
        self, ids_RT: torch.Tensor, mask_RT: torch.Tensor, positions_RT: torch.Tensor, cache: Any
    ) -> torch.Tensor:
        output = self._model(
            input_ids=ids_RT,
            attention_mask=mask_RT,
            position_ids=positions_RT,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits_RV: torch.Tensor = output.logits[:, -1]
        return logits_RV

    def _merge(self, cache: Any, mask_RT: torch.Tensor) -> None:
        width = max(self._mask_RT.shape[1], mask_RT.shape[1])
        merged = DynamicCache()
        for index, (old, new) in enumerate(zip(self._cache.layers, cache.layers, strict=True)):
            merged.update(
                torch.cat([_padded(old.keys, width), _padded(new.keys, width)]),
                torch.cat([_padded(old.values, width), _padded(new.values, width)]),
                index,
            )
        self._cache = merged
        self._mask_RT = torch.cat([_padded(mask, width, dim=1) for mask in (self._mask_RT, mask_RT)])

    def _sample(self, logits_RV: torch.Tensor, version: int) -> None:
        rows = self.rows
        temperature_R = torch.tensor([row.call.sampling.temperature for row in rows], device=self._device).double()
        greedy_R = temperature_R == 0
        scale_R1 = torch.where(greedy_R, 1.0, temperature_R)[:, None]
        logprob_RV = torch.log_softmax(logits_RV.double() / scale_R1, dim=-1)
        position_R = np.array([len(row.call.prompt) + len(row.tokens) for row in rows])
        uniform_R = torch.from_numpy(uniform(streams([row.seed for row in rows]), position_R)).to(self._device)
        cumulative_RV = logprob_RV.exp().cumsum(dim=-1)
        drawn_R = (cumulative_RV <= (uniform_R * cumulative_RV[:, -1])[:, None]).sum(dim=-1)
        tokens_R = torch.where(greedy_R, logits_RV.argmax(dim=-1), drawn_R)
        logprobs = logprob_RV.gather(1, tokens_R[:, None])[:, 0].tolist()
        for row, token, logprob in zip(rows, tokens_R.tolist(), logprobs, strict=True):
            row.append(token, logprob, version)
            row.finish_if_done()


class TransformersCore:
    """The stepped part: the model, the batch and its cache."""

    def __init__(self, directory: str, *, slots: int, dtype: str, options: TransformersOptions) -> None:
        self._device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        with MODEL_LOADING:
            model = AutoModelForCausalLM.from_pretrained(
                directory, dtype=getattr(torch, dtype), attn_implementation=options.attention, local_files_only=True
            )
        self._model: Any = model.to(self._device).eval().requires_grad_(False)
        self._slots = slots
        self._waiting: deque[Response] = deque()
        self._alone = options.batch_invariant
        self._batches: list[Batch] = []
        self._version = -1
        self.generated = 0
        self.vocabulary: int = self._model.config.get_text_config().vocab_size

    @property
    def busy(self) -> bool:
        """Whether a response is unfinished."""
        return bool(self._batches or self._waiting)

    def add(self, call: Call) -> None:
        """Queue the call's responses."""
        self._waiting.extend(call.responses)

    def abort(self, responses: Sequence[Response]) -> None:
        """Forget these responses."""
        gone = {response.number for response in responses}
        self._waiting = deque(response for response in self._waiting if response.number not in gone)
        for batch in self._batches:
            batch.keep([response.number not in gone for response in batch.rows])
        self._drop_empty()

    @torch.inference_mode()
    def step(self) -> Sequence[Response]:
        """The next token of every row, and the first of those that find a free slot."""
        self._admit()
        for batch in self._batches:
            self.generated += batch.advance(self._version)
        finished = [response for batch in self._batches for response in batch.rows if response.finish_reason]
        if finished:
            for batch in self._batches:
                batch.keep([not response.finish_reason for response in batch.rows])
            self._drop_empty()
        return finished

    def _admit(self) -> None:
        """Fill the slots. Alone, a batch takes the responses of one call, as many as fit where nothing else runs: how
        a call is cut does not depend on its neighbours."""
        while self._waiting:
            free = self._slots - sum(map(len, self._batches))
            call = self._waiting[0].call
            wanted = takewhile(lambda response: response.call is call, self._waiting) if self._alone else self._waiting  # noqa: B023
            part = list(islice(wanted, self._slots if self._alone else free))
            if not part or len(part) > free:
                return
            if self._alone or not self._batches:
                self._batches.append(Batch(self._model, self._device))
            self._batches[-1].joining += part
            for _ in part:
                self._waiting.popleft()

    def _drop_empty(self) -> None:
        self._batches = [batch for batch in self._batches if batch.rows]

    @torch.inference_mode()
    def score(self, tokens: list[int]) -> Floats:
        """Log-probabilities of tokens[1:], nats."""
        input_ids = torch.tensor([tokens], device=self._device)
        logits_TV = self._model(input_ids=input_ids, use_cache=False).logits[0, :-1].float()
        logprob_T = torch.log_softmax(logits_TV, dim=-1).gather(1, input_ids[0, 1:, None])[:, 0]
        scored: Floats = logprob_T.cpu().numpy()
        return scored

    @torch.inference_mode()
    def swap(self, weights: WeightHandle, *, recompute: bool) -> tuple[frozenset[str], float]:
        """Copy weights in between two steps. Returns the names consumed, and how long generation stood still, s."""
        started = time.perf_counter()
        manifest = weights.manifest
        parameters = dict(self._model.named_parameters())
        check_names(manifest, frozenset(parameters))
        buffer = torch.from_numpy(map_file(weights.path, mode="c"))
        for tensor in manifest.tensors:
            parameter = parameters[tensor.name]
            if tuple(parameter.shape) != tensor.shape:
                raise WeightsError(
                    f"version {manifest.version}: tensor {tensor.name} has shape {tensor.shape}, the engine's model "
                    f"{tuple(parameter.shape)}: learner and engine hold different models"
                )
            flat = buffer[tensor.offset : tensor.offset + tensor.size]
            parameter.copy_(flat.view(getattr(torch, tensor.dtype)).view(tensor.shape))
        if recompute:
            for batch in self._batches:
                batch.recompute()
        self._version = manifest.version
        return frozenset(parameters), time.perf_counter() - started

    def close(self) -> None:
        """Drop the model."""
        self._model = None
        self._batches = []


def _padded(x: torch.Tensor, width: int, dim: int = 2) -> torch.Tensor:
    """`x` with zeros in front, so that dimension `dim` has `width` entries."""
    missing = width - x.shape[dim]
    if not missing:
        return x
    shape = list(x.shape)
    shape[dim] = missing
    return torch.cat([x.new_zeros(shape), x], dim=dim)


class TransformersEngine:
    """`core.protocols.Engine` over a Hugging Face causal LM with a key-value cache.

    Args:
        model: directory of a Hugging Face checkpoint.
        slots: sequences generated at the same time.
        max_model_len: tokens of prompt and response together.
        dtype: "float32", "bfloat16" or "float16".
        seed: unused: nothing here is random beyond the seeds of a call.
        options: see `TransformersOptions`.

    Raises:
        EngineError: the model does not load.
    """

    def __init__(
        self, model: str, *, slots: int, max_model_len: int, dtype: str = "float32", seed: int = 0, **options: Any
    ) -> None:
        chosen = self._options = TransformersOptions.parse(options, source="engine transformers")
        self._pump = Pump(
            lambda: TransformersCore(model, slots=slots, dtype=dtype, options=chosen),
            name="transformers",
            max_model_len=max_model_len,
        )
        self._core = self._pump.core
        self._max_model_len = max_model_len
        self._version = -1
        self._loading = asyncio.Lock()

    async def sample(self, tokens_P: Ints, *, sampling: Sampling, seeds: Sequence[int], key: str) -> Sequence[Rollout]:
        """See `core.protocols.Engine.sample`."""
        return await self._pump.sample(tokens_P, sampling=sampling, seeds=seeds, key=key)

    async def load(self, weights: WeightHandle, *, prove: bool) -> Proof:
        """See `core.protocols.Engine.load`."""
        async with self._loading:
            manifest = weights.manifest
            digest = await asyncio.to_thread(check_digest, weights)
            recompute = self._options.prefix_cache == "recompute"
            consumed, pause_s = await self._pump.between(lambda: self._core.swap(weights, recompute=recompute))
            self._version = manifest.version
            gap = await probe_gap(manifest, self._score, longest=self._max_model_len) if prove else None
            return Proof(version=manifest.version, digest=digest, consumed=consumed, probe_gap=gap, pause_s=pause_s)

    async def score(self, tokens_T: Ints) -> Floats:
        """See `core.protocols.Engine.score`."""
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
        """All response tokens it ever sampled."""
        return self._core.generated

    @property
    def aborted(self) -> int:
        """Tokens of responses that were given up: generated = returned + aborted + in progress."""
        return self._pump.aborted

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
        """Give up what runs and drop the model."""
        await self._pump.close()

    async def _score(self, tokens_T: Ints) -> Floats:
        if len(tokens_T) < 2:
            return np.zeros(0, np.float32)
        tokens = tokens_T.tolist()
        return await self._pump.between(lambda: self._core.score(tokens))
