"""A softmax table: the exact engine of the tests, in pure numpy and milliseconds.

The logits of the next token are `table[token, min(position, L - 1)]`, where `token` is the previous token and
`position` its index in prompt and response together; `table` is [V, L, V].
"""

import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from millrace.actors.engines.pump import Call, Response, check_call
from millrace.actors.engines.sampling import log_softmax, sample, streams, uniform
from millrace.actors.weights import check_digest, probe_gap
from millrace.core.calls import Bell
from millrace.core.config import Config
from millrace.core.errors import EngineError, ModelError, WeightsError
from millrace.core.protocols import Proof, Sampling, WeightHandle
from millrace.core.types import Floats, Ints, Rollout
from millrace.core.weights import views

MODEL_TYPE = "millrace_table"


class TableOptions(Config):
    """What the table engine takes beside the common arguments."""

    token_delay_s: float = 0.0
    """Time one token takes, to imitate long generations."""
    chunk_tokens: int = 8
    """Tokens sampled between two looks at the event loop; weights may change there."""


class TableEngine:
    """`core.protocols.Engine` over a checkpoint directory with `config.json` and the tensor `table` [V, L, V].

    Raises:
        ModelError: the directory is not a table checkpoint.
    """

    def __init__(
        self, model: str, *, slots: int, max_model_len: int, dtype: str = "float32", seed: int = 0, **options: Any
    ) -> None:
        self._options = TableOptions.parse(options, source="engine table")
        if dtype != "float32":
            raise ModelError(f"engine table: dtype = {dtype}: a table is float32")
        self._slots, self._max_model_len, self._seed = slots, max_model_len, seed
        self._table = read_table(model)
        self._version = -1
        self._calls: dict[str, Call] = {}
        self._freed = Bell()
        self._used = 0  # slots
        self._loading = asyncio.Lock()
        self._generated = 0
        self.aborted = 0  # tokens of responses that were given up

    async def sample(self, tokens_P: Ints, *, sampling: Sampling, seeds: Sequence[int], key: str) -> Sequence[Rollout]:
        """See `core.protocols.Engine.sample`. A call starts when all its sequences have a slot."""
        vocabulary = len(self._table)
        check_call(
            tokens_P, sampling, seeds, key, self._calls, max_model_len=self._max_model_len, vocabulary=vocabulary
        )
        loop = asyncio.get_running_loop()
        call = Call(key=key, prompt=tokens_P.tolist(), sampling=sampling, loop=loop, done=loop.create_future())
        call.responses = [Response(call, number, seed) for number, seed in enumerate(seeds)]
        self._calls[key] = call
        finished = False
        try:
            await self._freed.until(
                lambda: call.done.done() or not self._used or self._used + len(seeds) <= self._slots
            )
            if not call.done.done():
                self._hold(call, len(seeds))
            await self._run(call)
            finished = True
        finally:
            self._hold(call, 0)
            del self._calls[key]
            if not finished:
                self.aborted += call.tokens
        return tuple(response.rollout() for response in call.responses)

    async def load(self, weights: WeightHandle, *, prove: bool) -> Proof:
        """See `core.protocols.Engine.load`."""
        async with self._loading:
            manifest = weights.manifest
            digest = await asyncio.to_thread(check_digest, weights)
            consumed = frozenset(tensor.name for tensor in manifest.tensors)
            if consumed != {"table"}:
                raise WeightsError(f"version {manifest.version}: a table has one parameter, got {sorted(consumed)}")
            table = np.array(views(weights)["table"])
            if table.shape != self._table.shape:
                raise WeightsError(
                    f"version {manifest.version}: tensor table has shape {table.shape}, the engine {self._table.shape}"
                )
            self._table, self._version = table, manifest.version
            gap = await probe_gap(manifest, self.score, longest=self._max_model_len) if prove else None
            return Proof(version=manifest.version, digest=digest, consumed=consumed, probe_gap=gap)

    async def score(self, tokens_T: Ints) -> Floats:
        """See `core.protocols.Engine.score`."""
        logprob_TV = log_softmax(self._logits(tokens_T[:-1], np.arange(len(tokens_T) - 1)))
        scored: Floats = logprob_TV[np.arange(len(tokens_T) - 1), tokens_T[1:]].astype(np.float32)
        return scored

    async def abort(self, key: str) -> None:
        """See `core.protocols.Engine.abort`."""
        call = self._calls.get(key)
        if call is not None and not call.done.done():
            call.done.set_exception(EngineError(f"sample '{key}' was aborted after {call.tokens} tokens"))
            self._freed.ring()

    @property
    def version(self) -> int:
        """Of the weights it holds; -1 before the first load."""
        return self._version

    @property
    def generated(self) -> int:
        """All response tokens it ever sampled."""
        return self._generated

    def progress(self) -> Mapping[str, int]:
        """Tokens sampled so far, by key of the running calls."""
        return {key: call.tokens for key, call in self._calls.items()}

    @property
    def unfinished(self) -> int:
        """Responses of the running calls that go on."""
        return sum(not response.finish_reason for call in self._calls.values() for response in call.responses)

    async def watch(self) -> None:
        """See `core.protocols.Engine.watch`. A table is gone only with this process."""
        await asyncio.Event().wait()

    async def close(self) -> None:
        """Give up what runs."""
        for key in list(self._calls):
            await self.abort(key)

    def _logits(self, tokens_R: NDArray[np.integer[Any]], position_R: NDArray[np.integer[Any]]) -> NDArray[np.float32]:
        logits_RV: NDArray[np.float32] = self._table[tokens_R, np.minimum(position_R, self._table.shape[1] - 1)]
        return logits_RV

    def _hold(self, call: Call, slots: int) -> None:
        self._used += slots - call.pending
        call.pending = slots
        self._freed.ring()

    async def _run(self, call: Call) -> None:
        running = list(call.responses)
        while running:
            await asyncio.sleep(self._options.token_delay_s * self._options.chunk_tokens)
            if call.done.done():
                call.done.result()  # aborted: raises
            for _ in range(self._options.chunk_tokens):
                running = self._step(call, running)
            if len(running) < call.pending:
                self._hold(call, len(running))
        call.done.cancel()

    def _step(self, call: Call, running: list[Response]) -> list[Response]:
        if not running:
            return running
        seen = len(call.prompt) + len(running[0].tokens)
        last_R = np.array([(response.tokens or call.prompt)[-1] for response in running])
        position_R = np.full(len(running), seen - 1)
        uniform_R = uniform(streams([response.seed for response in running]), position_R)
        tokens_R, logprob_R = sample(self._logits(last_R, position_R), uniform_R, call.sampling.temperature)
        self._generated += len(running)
        for response, token, logprob in zip(running, tokens_R.tolist(), logprob_R.tolist(), strict=True):
            response.append(token, logprob, self._version)
            response.finish_if_done()
        return [response for response in running if not response.finish_reason]


def read_table(directory: str) -> NDArray[np.float32]:
    """The tensor `table` [V, L, V] of a checkpoint directory.

    Raises:
        ModelError: the directory is not a table checkpoint.
    """
    folder = Path(directory)
    config, weights = folder / "config.json", folder / "model.safetensors"
    for path in (config, weights):
        if not path.is_file():
            raise ModelError(f"{path} is missing: a table checkpoint has config.json and model.safetensors")
    settings = json.loads(config.read_text())
    if settings.get("model_type") != MODEL_TYPE:
        raise ModelError(
            f"{config}: model_type is {settings.get('model_type')!r}, the table engine runs '{MODEL_TYPE}': "
            'set engine = "vllm" or "transformers"'
        )
    shape = (settings["vocab_size"], settings["positions"], settings["vocab_size"])
    tensors = load_file(weights)
    if "table" not in tensors or tensors["table"].shape != shape:
        found = {name: tensor.shape for name, tensor in tensors.items()}
        raise ModelError(f"{weights}: it holds {found}, config.json describes one tensor table of shape {shape}")
    table: NDArray[np.float32] = tensors["table"].astype(np.float32)
    return table
