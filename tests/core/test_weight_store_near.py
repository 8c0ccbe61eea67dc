"""A worker on the store's machine reads its files; one elsewhere copies them first."""

import asyncio
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from millrace.core.weight_store import FileWeightStore, NodeStore
from tests.core.test_weight_store_held import published


class Far:
    """A store on another machine: neither its mark nor its files are seen here."""

    def __init__(self, store: FileWeightStore) -> None:
        self.store = store
        self.reads = 0

    async def mark(self) -> str:
        return "/nowhere/store-0"

    async def read(self, version: int) -> Any:
        self.reads += 1
        return await self.store.read(version)


def test_on_the_stores_machine_its_own_files_are_read(tmp_path: Path) -> None:
    async def main() -> None:
        store = FileWeightStore(str(tmp_path))
        await published(store, steps=range(2))
        handle = await NodeStore(store).fetch(101)
        assert Path(handle.path).parent == tmp_path

    asyncio.run(main())


def test_elsewhere_a_version_is_copied_once(tmp_path: Path) -> None:
    async def main() -> None:
        store = FileWeightStore(str(tmp_path))
        await published(store, steps=range(2))
        far = Far(store)
        near = NodeStore(far)
        handle, again = await near.fetch(101), await near.fetch(101)
        assert far.reads == 1
        assert handle == again
        assert Path(handle.path).parent != tmp_path
        assert np.array_equal(np.fromfile(handle.path, np.uint8), np.full(64, 101, np.uint8))

    asyncio.run(main())


def test_a_restarted_store_has_a_mark_of_its_own(tmp_path: Path) -> None:
    async def main() -> None:
        first = await FileWeightStore(str(tmp_path)).mark()
        second = await FileWeightStore(str(tmp_path)).mark()
        assert first != second
        assert not Path(first).exists()
        assert Path(second).exists()

    asyncio.run(main())


def test_it_goes_to_another_process(tmp_path: Path) -> None:
    assert isinstance(pickle.loads(pickle.dumps(NodeStore("handle"))), NodeStore)
