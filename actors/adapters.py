"""Adapters in, whole weights out: what stands between a store of LoRA versions and an engine.

Engines know whole weights only. So each receiver keeps the base model's weights, and merges what arrives:

    W = W_base + scale * lora_B @ lora_A        in float32, then cast to what engines compute in

Only weights with adapters are computed and written again. The outcome alternates between two files: an engine may still
read one while the other is written. They are memory of this process and gone with it, however it ends.
"""

import asyncio
import mmap
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from millrace.actors.engines.wiring import load_reference
from millrace.actors.weights import check_digest
from millrace.core.errors import WeightsError
from millrace.core.protocols import Adapter, Engine, Manifest, Tensor, WeightHandle, WeightStore
from millrace.core.weights import (
    VersionGoneError,
    buffer_bytes,
    digest_of,
    factors_of,
    identity_of,
    layout,
    mapped,
    view_of,
)

FETCHES = 4  # in a row, before versions that vanish before they are mapped count as an error


def whole_weights(store: WeightStore, engine: Engine | Mapping[str, Any]) -> WeightStore:
    """The store as an engine sees it.

    Args:
        engine: as it is built from {"name": ..., "model": ...}; one that is built already has no base to merge with.
    """
    return MergingStore(
        store, model=str(engine["model"]) if isinstance(engine, Mapping) and "model" in engine else None
    )


class MergingStore:
    """A weight store in which every version is whole: adapters are merged with the base model's weights.

    It keeps, from the first adapter on, the base's weights that have adapters and two buffers of whole weights in
    memory. Whole versions pass through untouched.

    Args:
        store: where versions come from.
        model: directory or hub id of the base model; None: versions are whole.
    """

    def __init__(self, store: WeightStore, *, model: str | None) -> None:
        self._store = store
        self._model = model
        self._base: _Base | None = None
        self._buffers: Sequence[_Buffer] = ()
        self._last: WeightHandle | None = None
        self._turn = asyncio.Lock()

    async def publish(self, manifest: Manifest, buffer: NDArray[np.uint8]) -> None:
        """To the store."""
        await self._store.publish(manifest, buffer)

    async def fetch(self, version: int) -> WeightHandle:
        """As `WeightStore.fetch`. The bytes of a merged version stay as they are until the next but one is fetched.

        Raises:
            WeightsError: the adapter belongs to another base, does not fit it, or is not what was published.
        """
        return await self._whole(await self._store.fetch(version))

    async def newer(self, *, than: int, wait_s: float) -> WeightHandle | None:
        """As `WeightStore.newer`, merged as by `fetch`."""
        handle = await self._store.newer(than=than, wait_s=wait_s)
        return handle and await self._whole(handle)

    async def _whole(self, handle: WeightHandle) -> WeightHandle:
        version = handle.manifest.version
        for _ in range(FETCHES):
            if handle.manifest.adapter is None:
                return handle
            try:
                async with self._turn:
                    return await asyncio.to_thread(self._merged, handle)
            except VersionGoneError:
                handle = await self._store.fetch(version)
        raise WeightsError(
            f"version {version}: {FETCHES} fetched versions in a row were deleted before they could be merged: keep "
            "more versions in the weight store"
        )

    def _merged(self, handle: WeightHandle) -> WeightHandle:
        manifest, adapter = handle.manifest, handle.manifest.adapter
        assert adapter is not None
        last = self._last
        if last is not None and (last.manifest.version, last.manifest.epoch) == (manifest.version, manifest.epoch):
            return last
        check_digest(handle)
        base = self._opened(manifest, adapter)
        buffer = self._buffers[0]
        base.merge(manifest, mapped(handle), buffer.bytes, scale=adapter.scale)
        whole = replace(manifest, tensors=base.tensors, digest=digest_of(buffer.bytes), adapter=None)
        self._buffers = self._buffers[::-1]
        self._last = WeightHandle(manifest=whole, path=buffer.path)
        return self._last

    def _opened(self, manifest: Manifest, adapter: Adapter) -> "_Base":
        """The base, which must be the one that the adapter belongs to."""
        base = self._base
        if base is None:
            if self._model is None:
                raise WeightsError(
                    f"version {manifest.version} is an adapter, but this engine's base model is not known: build the "
                    "engine from its name and model"
                )
            base = _Base.of(self._model, manifest, adapter)
            self._buffers = [_Buffer(base.whole) for _ in range(2)]
            self._base = replace(base, whole=np.zeros(0, np.uint8))
        if adapter.base != base.identity:
            raise WeightsError(
                f"version {manifest.version} is an adapter of a base model with weights {adapter.base[:12]}, this "
                f"machine's {self._model} has {base.identity[:12]}: give the engine the learner's own model files"
            )
        return base


@dataclass(frozen=True, slots=True, kw_only=True)
class _Base:
    """The base model: its identity, the layout of whole weights, and the weights that adapters change."""

    identity: str
    tensors: tuple[Tensor, ...]
    whole: NDArray[np.uint8]  # all weights, as engines compute in; copied into the buffers, then let go
    adapted: Mapping[str, torch.Tensor]  # float32, or bfloat16 where that holds the same values

    @staticmethod
    def of(model: str, manifest: Manifest, adapter: Adapter) -> "_Base":
        named = dict(load_reference(model, "float32").named_parameters())
        adapted = factors_of(manifest.tensors).keys()
        if odd := sorted(adapted - named.keys()):
            raise WeightsError(
                f"version {manifest.version} has an adapter of {odd[0]}, which {model} has not: learner and engine "
                "hold different models"
            )
        tensors = layout((name, adapter.dtype, tuple(weight.shape)) for name, weight in named.items())
        whole = np.zeros(buffer_bytes(tensors), np.uint8)
        for tensor in tensors:
            _tensor(whole, tensor).copy_(named[tensor.name])
        return _Base(
            identity=identity_of((name, weight.numpy()) for name, weight in named.items()),
            tensors=tensors,
            whole=whole,
            adapted={name: _compact(named[name].detach()) for name in adapted},
        )

    @torch.inference_mode()
    def merge(self, manifest: Manifest, factors: NDArray[np.uint8], whole: NDArray[np.uint8], *, scale: float) -> None:
        """Write the weights that have adapters into `whole`."""
        places = {tensor.name: tensor for tensor in self.tensors}
        pairs = factors_of(manifest.tensors)
        if odd := sorted(pairs.keys() ^ self.adapted.keys()):
            raise WeightsError(
                f"version {manifest.version}: earlier versions had other adapters, such as of {odd[0]}: start the "
                "worker again"
            )
        for name, pair in pairs.items():
            b, a = (torch.from_numpy(np.array(view_of(factors, tensor))) for tensor in pair)
            if (len(b), a.shape[1]) != tuple(places[name].shape):
                raise WeightsError(
                    f"version {manifest.version}: the adapter of {name} makes {[len(b), a.shape[1]]}, the weight is "
                    f"{list(places[name].shape)}: learner and engine hold different models"
                )
            _tensor(whole, places[name]).copy_(torch.addmm(self.adapted[name].float(), b, a, alpha=scale))


def _tensor(buffer: NDArray[np.uint8], tensor: Tensor) -> torch.Tensor:
    flat = torch.from_numpy(buffer[tensor.offset : tensor.offset + tensor.size])
    return flat.view(getattr(torch, tensor.dtype)).view(tensor.shape)


def _compact(weight: torch.Tensor) -> torch.Tensor:
    half = weight.to(torch.bfloat16)
    return half if torch.equal(half.float(), weight) else weight


class _Buffer:
    """Bytes that engine processes of this machine open by a path, and that end with this process."""

    def __init__(self, content: NDArray[np.uint8]) -> None:
        if hasattr(os, "memfd_create"):
            self._file = os.fdopen(os.memfd_create("millrace-weights"), "r+b")
            self.path = f"/proc/{os.getpid()}/fd/{self._file.fileno()}"
        else:  # macOS: a killed process leaves the file to the system's cleaning of temporary files
            self._file = tempfile.NamedTemporaryFile(prefix="millrace-weights-")  # type: ignore[assignment]  # noqa: SIM115
            self.path = self._file.name
        self._file.truncate(len(content))
        self.bytes: NDArray[np.uint8] = np.frombuffer(mmap.mmap(self._file.fileno(), len(content)), np.uint8)
        self.bytes[:] = content
