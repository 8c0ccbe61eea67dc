"""Adapters in, whole weights out: what stands between a store of LoRA versions and an engine.

Engines know whole weights only. So each receiver keeps the base model's weights, and merges what arrives:

    W = W_base + scale * lora_B @ lora_A        in float32, then cast to what engines compute in

Only weights with adapters are computed and written again. The outcome alternates between two files: an engine may still
read one while the other is written. They are memory of this process and gone with it, however it ends.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np

from millrace.actors.weights import check_digest
from millrace.core.errors import WeightsError
from millrace.core.protocols import Adapter, Engine, Manifest, Packing, WeightHandle, WeightStore
from millrace.core.weights import VersionGoneError, digest_of, mapped

MERGING = "millrace.actors.merging"  # imports torch and transformers: most workers never meet an adapter
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
        self._base: Any = None  # merging.Base
        self._buffers: Sequence[Any] = ()  # merging.Buffer
        self._last: WeightHandle | None = None
        self._turn = asyncio.Lock()

    async def pour(self, packing: Packing) -> Manifest:
        """To the store."""
        return await self._store.pour(packing)

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
        whole: Manifest = replace(manifest, tensors=base.tensors, digest=digest_of(buffer.bytes), adapter=None)
        self._buffers = self._buffers[::-1]
        self._last = WeightHandle(manifest=whole, path=buffer.path)
        return self._last

    def _opened(self, manifest: Manifest, adapter: Adapter) -> Any:
        """The base, which must be the one that the adapter belongs to."""
        base = self._base
        if base is None:
            if self._model is None:
                raise WeightsError(
                    f"version {manifest.version} is an adapter, but this engine's base model is not known: build the "
                    "engine from its name and model"
                )
            merging = import_module(MERGING)
            base = merging.Base.of(self._model, manifest, adapter)
            self._buffers = [merging.Buffer(base.whole) for _ in range(2)]
            self._base = replace(base, whole=np.zeros(0, np.uint8))
        if adapter.base != base.identity:
            raise WeightsError(
                f"version {manifest.version} is an adapter of a base model with weights {adapter.base[:12]}, this "
                f"machine's {self._model} has {base.identity[:12]}: give the engine the learner's own model files"
            )
        return base
