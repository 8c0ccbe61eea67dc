"""Versions that an evaluation will want stay until it has had them."""

import asyncio
from pathlib import Path

import numpy as np

from millrace.core.protocols import Manifest
from millrace.core.weight_store import FileWeightStore
from millrace.core.weights import digest_of, layout


def manifest(version: int, step: int) -> tuple[Manifest, np.ndarray]:
    tensors = layout([("w", "float32", (4,))])
    buffer = np.full(64, version, np.uint8)
    return Manifest(version=version, step=step, epoch=1, tensors=tensors, digest=digest_of(buffer)), buffer


async def published(store: FileWeightStore, *, steps: range) -> None:
    for step in steps:
        await store.publish(*manifest(step + 100, step))


def test_every_third_step_and_the_last_are_held(tmp_path: Path) -> None:
    async def main() -> None:
        store = FileWeightStore(str(tmp_path), hold_every=3, hold_last=7)
        await published(store, steps=range(8))
        assert await store.held() == (100, 103, 106, 107)
        assert store.versions == (100, 103, 106, 107)
        assert (await store.fetch(103)).manifest.step == 3

    asyncio.run(main())


def test_what_is_released_goes_unless_it_is_among_the_newest(tmp_path: Path) -> None:
    async def main() -> None:
        store = FileWeightStore(str(tmp_path), hold_every=3, hold_last=7)
        await published(store, steps=range(8))
        for version in (100, 103, 106, 107, 107):
            await store.release(version)
        assert await store.held() == ()
        assert store.versions == (106, 107)
        assert sorted(path.name for path in tmp_path.glob("*.bin")) == ["version_00000106.bin", "version_00000107.bin"]

    asyncio.run(main())


def test_nothing_is_held_where_nobody_evaluates(tmp_path: Path) -> None:
    async def main() -> None:
        store = FileWeightStore(str(tmp_path))
        await published(store, steps=range(4))
        assert await store.held() == ()
        assert store.versions == (102, 103)

    asyncio.run(main())
