"""The two sides of benchmarks/publish.py as Ray actors: a learner that publishes, and engines that follow.

Times are of the machine's monotonic clock, which its processes share.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from millrace.actors.engines import engine
from millrace.actors.weights import WeightReceiver
from millrace.core.protocols import Manifest, Sampling, WeightHandle
from millrace.core.weight_store import NodeStore
from millrace.core.weights import digest_of, write
from millrace.learner.model import Policy, load_model
from millrace.learner.publish import Publisher

now = time.monotonic
HEAR_S = 20.0
VOCABULARY = 512


class PublishingLearner:
    """Finished weights and the real Publisher, without a loop around them."""

    def __init__(self, model: str, store: NodeStore, *, dtype: Any) -> None:
        torch.set_num_threads(1)
        self._model = load_model(model)
        self._publisher = Publisher(Policy(self._model), dtype=dtype, probe_every=10_000)
        self._store = store

    async def publish(self, version: int) -> dict[str, float]:
        """Publish as the Learner does. The clock starts with the weights finished."""
        with torch.no_grad():
            for parameter in self._model.parameters():
                parameter.add_(1e-4)  # so that every version has bytes of its own
        began = now()
        packed = await asyncio.to_thread(lambda: self._publisher.packed(version=version, step=version, epoch=1))
        written = 0.0

        def manifest(digest: str) -> Manifest:  # the last that is asked for, when all bytes are in the file
            nonlocal written
            written = now()
            return packed.manifest(digest)

        await self._store.pour(replace(packed, manifest=manifest))
        return {"began": began, "written": written, "published": now()}

    async def local(self, directory: str, version: int) -> WeightHandle:
        """A copy of the weights that was fetched and verified long ago."""
        manifest, buffer = self._publisher.pack(version=version, step=version, epoch=1)
        return write(directory, replace(manifest, probes=()), buffer)

    async def limits(self) -> dict[str, float]:
        """Seconds for the same bytes: copied in memory, and digested. Bytes."""
        buffer = self._publisher.pack(version=0, step=0, epoch=1)[1]
        other = np.empty_like(buffer)
        return {
            "bytes": float(buffer.size),
            "memcpy_s": _best(lambda: np.copyto(other, buffer)),
            "digest_s": _best(lambda: digest_of(buffer)),
            "probes_s": _best(lambda: self._publisher._score(self._publisher._probes)),
        }


def _best(work: Callable[[], object]) -> float:
    spent = []
    for _ in range(5):
        began = now()
        work()
        spent.append(now() - began)
    return min(spent)


@dataclass(slots=True)
class Timeline:
    """What an engine's thread did, and when its worker heard of versions."""

    steps: list[tuple[float, float, int]] = field(default_factory=list)  # began, ended, version that sampled
    swaps: dict[int, tuple[float, float]] = field(default_factory=dict)  # version -> began, ended
    heard: dict[int, float] = field(default_factory=dict)  # version -> when the store's answer was here


def first_of(steps: Sequence[tuple[float, float, int]], version: int) -> float:
    """When the first step ended that sampled with `version`.

    >>> first_of([(0.0, 1.0, 3), (1.0, 2.0, 4), (2.0, 3.0, 4)], 4)
    2.0
    """
    return next(ended for _, ended, of in steps if of >= version)


class Serving:
    """A vLLM engine that generates without a pause, and the receiving end of publish as the GenerationWorker has it."""

    def __init__(self, model: str, store: NodeStore, *, dtype: str, slots: int, max_tokens: int) -> None:
        torch.set_num_threads(1)
        self._engine: Any = engine(
            "vllm", model=model, slots=slots, max_model_len=max_tokens + 64, dtype=dtype, kv_cache_gib=0.25
        )
        self._receiver = WeightReceiver(self._engine, store, probe_every=16)
        self._slots, self._max_tokens = slots, max_tokens
        self._line = Timeline()
        self._watch()
        self._tasks: list[asyncio.Task[None]] = []

    def _watch(self) -> None:
        core, line = self._engine._core, self._line
        step, swap, collect = core.step, core.swap, core._collect
        version = -1

        def collecting(outputs: Any) -> None:
            nonlocal version
            collect(outputs)
            version = int(outputs.weight_version or -1)

        def stepping() -> Any:
            began = now()
            finished = step()
            line.steps.append((began, now(), version))
            return finished

        def swapping(weights: WeightHandle, *, recompute: bool) -> Any:
            began = now()
            found = swap(weights, recompute=recompute)
            line.swaps[weights.manifest.version] = (began, now())
            return found

        core.step, core.swap, core._collect = stepping, swapping, collecting

    async def start(self) -> None:
        """Generate and follow from now on."""
        self._tasks = [asyncio.create_task(self._generate(slot)) for slot in range(self._slots)]
        self._tasks.append(asyncio.create_task(self._follow()))

    async def _generate(self, slot: int) -> None:
        rng = np.random.default_rng(slot)
        sampling = Sampling(max_tokens=self._max_tokens)
        for number in range(10**9):
            prompt_P = rng.integers(VOCABULARY, size=8).astype(np.int32)
            await self._engine.sample(prompt_P, sampling=sampling, seeds=[number], key=f"{slot}/{number}")

    async def _follow(self) -> None:
        while True:
            version = await self._receiver.hear(wait_s=HEAR_S)
            if version >= 0:
                self._line.heard[version] = now()
                await self._receiver.follow(version)

    async def reload(self, weights: WeightHandle, version: int, at: float) -> float:
        """Pause, reload, resume at time `at` with weights that are here; when the first token of it was sampled."""
        handle = WeightHandle(manifest=replace(weights.manifest, version=version), path=weights.path)
        await asyncio.sleep(max(0.0, at - now()))
        await self._engine._pump.between(lambda: self._engine._core.swap(handle, recompute=True))
        return await self.serves(version)

    async def serves(self, version: int) -> float:
        """When the first token of this version was sampled; waits for it."""
        line = self._line
        while not line.steps or line.steps[-1][2] < version:
            for task in self._tasks:
                if task.done():
                    task.result()
            await asyncio.sleep(0.002)
        return first_of(line.steps, version)

    async def timeline(self) -> Mapping[str, Any]:
        """Everything so far."""
        line = self._line  # copied: the engine's thread goes on writing
        return {"steps": list(line.steps), "swaps": dict(line.swaps), "heard": dict(line.heard)}

    async def close(self) -> None:
        """End the engine."""
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
        await self._engine.close()
