"""A store that dies half-way, two publishers, engines that come while a version is being published."""

import asyncio
import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from millrace.actors.weights import WeightReceiver
from millrace.core.errors import WeightsError
from millrace.core.failpoint import arm
from millrace.core.protocols import Manifest, Proof, WeightHandle
from millrace.core.weight_store import FileWeightStore
from millrace.core.weights import digest_of, layout, mapped

HALF = "weights.publish.half"


def version_of(version: int, *, step: int | None = None, fill: int | None = None) -> tuple[Manifest, NDArray[np.uint8]]:
    tensors = layout([("w", "float32", (4,))])
    buffer = np.full(64, version if fill is None else fill, np.uint8)
    step = version if step is None else step
    return Manifest(version=version, step=step, epoch=1, tensors=tensors, digest=digest_of(buffer)), buffer


class Whole:
    """A packing of bytes that lie in memory."""

    def __init__(self, manifest: Manifest, buffer: NDArray[np.uint8]) -> None:
        self._manifest, self._buffer, self.size = manifest, buffer, buffer.size

    def pour(self, write: Callable[[memoryview], object]) -> None:
        for part in np.array_split(self._buffer, 3):
            write(part.data)

    def manifest(self, digest: str) -> Manifest:
        assert digest == self._manifest.digest
        return self._manifest


def publish(store: FileWeightStore, *versions: int) -> None:
    for version in versions:
        asyncio.run(store.publish(*version_of(version)))


def newest(store: FileWeightStore) -> int:
    handle = asyncio.run(store.fetch(10**6))
    assert digest_of(mapped(handle)) == handle.manifest.digest
    return handle.manifest.version


@pytest.fixture
def halfway() -> Iterator[tuple[threading.Event, threading.Event]]:
    """(a publisher is half-way, let it go on)."""
    reached, go_on = threading.Event(), threading.Event()

    def hook(name: str) -> None:
        if name == HALF and not reached.is_set():
            reached.set()
            assert go_on.wait(20)

    arm(hook)
    yield reached, go_on
    go_on.set()
    arm(None)


DYING = """
import asyncio, sys
from tests.core.test_weight_store_faults import publish
from millrace.core.weight_store import FileWeightStore
publish(FileWeightStore(sys.argv[1]), 1, 2, 3)
"""


@pytest.mark.parametrize(("number", "left"), [(1, ()), (2, (1,)), (3, (1, 2))])
def test_a_store_killed_half_way_has_the_versions_before_and_takes_the_same_again(
    tmp_path: Path, number: int, left: tuple[int, ...]
) -> None:
    environment = {**os.environ, "MILLRACE_FAILPOINT": f"{HALF}@{number}=kill:{tmp_path / 'marker'}"}
    folder = tmp_path / "weights"
    ended = subprocess.run([sys.executable, "-c", DYING, str(folder)], env=environment, check=False)
    assert ended.returncode == -signal.SIGKILL
    store = FileWeightStore(str(folder))
    assert store.versions == left
    assert store.ignored == {f"version_{number:08d}.bin": "it was being written when its writer ended"}
    publish(store, number)
    assert newest(store) == number


def test_an_engine_that_comes_half_way_gets_the_version_before(
    tmp_path: Path, halfway: tuple[threading.Event, threading.Event]
) -> None:
    reached, go_on = halfway
    store = FileWeightStore(str(tmp_path))
    go_on.set()
    publish(store, 1)
    go_on.clear()
    reached.clear()
    with ThreadPoolExecutor(1) as threads:
        publishing = threads.submit(publish, store, 2)
        assert reached.wait(20)
        assert newest(store) == asyncio.run(store.fetch(2)).manifest.version == 1
        assert asyncio.run(store.held()) == ()
        go_on.set()
        publishing.result()
    assert newest(store) == 2


@pytest.mark.parametrize(("first", "second"), [(5, 6), (6, 5), (5, 5)])
def test_publishes_that_overlap_are_made_one_after_the_other(
    tmp_path: Path, halfway: tuple[threading.Event, threading.Event], first: int, second: int
) -> None:
    reached, go_on = halfway
    store = FileWeightStore(str(tmp_path))
    with ThreadPoolExecutor(2) as threads:
        one = threads.submit(publish, store, first)
        assert reached.wait(20)
        two = threads.submit(publish, store, second)
        assert not wait([two], timeout=0.1).done
        go_on.set()
        one.result()
        if second < first:
            with pytest.raises(WeightsError, match="version 5 cannot be published: version 6 was"):
                two.result()
        else:
            two.result()
    assert newest(store) == 6 if first != second else 5
    assert newest(FileWeightStore(str(tmp_path))) == newest(store)


def test_a_version_is_never_given_other_bytes(tmp_path: Path) -> None:
    store = FileWeightStore(str(tmp_path))
    publish(store, 4)
    with pytest.raises(WeightsError, match="versions are never reused"):
        asyncio.run(store.publish(*version_of(4, fill=9)))
    with pytest.raises(WeightsError, match="versions are never reused"):
        asyncio.run(FileWeightStore(str(tmp_path)).publish(*version_of(4, fill=9)))


def test_a_manifest_that_is_no_text_is_ignored_and_its_number_not_given_out_again(tmp_path: Path) -> None:
    publish(FileWeightStore(str(tmp_path)), 1, 2)
    (tmp_path / "version_00000002.json").write_bytes(b"\xff\x00\xfe")
    store = FileWeightStore(str(tmp_path))
    assert store.versions == (1,) and "not a weight manifest" in store.ignored["version_00000002.json"]
    with pytest.raises(WeightsError, match="versions are never reused"):
        publish(store, 2)


def test_a_version_that_finds_no_room_leaves_nothing_and_is_taken_when_there_is_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FileWeightStore(str(tmp_path))
    publish(store, 1)
    before = sorted(path.name for path in tmp_path.iterdir())

    def full(path: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError, match="No space left"):
        publish(store, 2)
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == before and newest(store) == 1
    publish(store, 2)
    assert newest(store) == 2


def test_a_store_made_again_knows_what_is_held_and_what_was_released(tmp_path: Path) -> None:
    def build() -> FileWeightStore:
        return FileWeightStore(str(tmp_path), hold_every=2, hold_last=9)

    store = build()
    publish(store, *range(10))
    for version in (0, 4):
        asyncio.run(store.release(version))
    assert asyncio.run(store.held()) == (2, 6, 8, 9)
    again = build()
    assert asyncio.run(again.held()) == (2, 6, 8, 9)
    assert again.versions == store.versions == (2, 6, 8, 9)
    asyncio.run(again.release(8))  # it stays as one of the newest, but is held no more
    third = build()
    assert asyncio.run(third.held()) == (2, 6, 9)
    assert third.versions == (2, 6, 8, 9)
    for version in (2, 6, 9):
        asyncio.run(third.release(version))
    assert build().versions == (8, 9)
    assert (
        sorted(path.suffix for path in tmp_path.glob("version_*")) == [".bin"] * 2 + [".json"] * 2 + [".released"] * 2
    )


class Loaded:
    """An engine that notes what it is handed."""

    def __init__(self) -> None:
        self.versions: list[int] = []

    @property
    def version(self) -> int:
        return self.versions[-1] if self.versions else -1

    async def load(self, weights: WeightHandle, *, prove: bool) -> Proof:
        mapped(weights)
        self.versions.append(weights.manifest.version)
        return Proof(version=self.version, digest=weights.manifest.digest, consumed=frozenset({"w"}))


def test_an_engine_never_goes_back(tmp_path: Path) -> None:
    """Neither when the store has lost its newest version, nor when two loads overlap, nor while versions vanish."""
    engine = Loaded()

    async def follow(store: Any, versions: Sequence[int]) -> None:
        receiver = WeightReceiver(engine, store, probe_every=1)  # type: ignore[arg-type]  # loads alone
        await asyncio.gather(*(receiver.follow(version) for version in versions))

    store = FileWeightStore(str(tmp_path))
    publish(store, 1, 2, 3)
    asyncio.run(follow(store, [3, 2]))
    (tmp_path / "version_00000003.bin").write_bytes(b"damaged")
    lost = FileWeightStore(str(tmp_path))
    assert newest(lost) == 2
    asyncio.run(follow(lost, [4]))  # announced, but this store holds nothing newer than 2
    assert engine.versions == [3]
    with pytest.raises(WeightsError, match="version 3 cannot be published"):
        publish(lost, 3)
    publish(lost, 4)

    async def beside_a_learner() -> None:
        receiver = WeightReceiver(engine, lost, probe_every=1)  # type: ignore[arg-type]  # loads alone
        for version in range(5, 60):
            await asyncio.gather(
                lost.publish(*version_of(version)), receiver.follow(version - 1), receiver.follow(version - 2)
            )

    asyncio.run(beside_a_learner())
    assert engine.versions == sorted(set(engine.versions))
    assert len(engine.versions) > 20
