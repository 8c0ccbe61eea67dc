"""What was mapped never changes, although files are written again; and versions are heard of at once."""

import asyncio
import fcntl
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from millrace.core import weight_files
from millrace.core.errors import WeightsError
from millrace.core.weight_files import SPARE, VersionGoneError, fill, let_go, map_file
from millrace.core.weight_store import FileWeightStore, NodeStore
from millrace.core.weights import mapped, temporary_of
from tests.core.test_weight_store_faults import Whole, newest, publish, version_of

BYTES = 3 * 4096


def content(value: int) -> np.ndarray:
    return np.full(BYTES, value, np.uint8)


def test_a_file_that_nobody_reads_is_written_again(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    fill(first, content(1))
    inode = first.stat().st_ino
    let_go(first)
    fill(second, content(2)[:4096])
    assert second.stat().st_ino == inode and second.read_bytes() == b"\2" * 4096
    assert [path.name for path in tmp_path.iterdir()] == ["second"]


@pytest.mark.parametrize("mode", ["r", "c"])
def test_what_is_mapped_is_not_written_again_before_its_reader_lets_it_go(tmp_path: Path, mode: Any) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    fill(first, content(1))
    held = map_file(str(first), mode=mode)
    part = held[100:200]
    del held
    let_go(first)
    fill(second, content(2))
    assert (part == 1).all()
    spare = next(tmp_path.glob(f"{SPARE}*"))
    del part
    fill(tmp_path / "third", content(3))
    assert not spare.exists(), "its reader is gone"


READING = """
import sys
from millrace.core.weight_files import map_file
held = map_file(sys.argv[1])
print("mapped", flush=True)
sys.stdin.read()
print(set(held.tolist()), flush=True)
"""


def test_a_reader_in_another_process_is_respected_until_it_is_killed(tmp_path: Path) -> None:
    first = tmp_path / "first"
    fill(first, content(1))
    inode = first.stat().st_ino
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", READING, str(first)], **pipes) as reader:
        assert reader.stdout is not None and reader.stdout.readline() == "mapped\n"
        let_go(first)
        fill(tmp_path / "second", content(2))
        assert (tmp_path / "second").stat().st_ino != inode
        reader.kill()
        reader.wait()
    fill(tmp_path / "third", content(3))
    assert (tmp_path / "third").stat().st_ino == inode


def test_who_opened_a_file_just_before_it_was_let_go_does_not_read_its_next_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tmp_path / "first"
    fill(first, content(1))
    flock = fcntl.flock

    def late(descriptor: int, kind: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        let_go(first)
        fill(tmp_path / "second", content(2))
        flock(descriptor, kind)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(VersionGoneError, match="fetch it"):
        map_file(str(first))


def test_a_file_that_is_being_written_is_not_read(tmp_path: Path) -> None:
    first = tmp_path / "first"
    fill(first, content(1))
    with first.open("r+b") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        with pytest.raises(VersionGoneError):
            map_file(str(first))


def test_where_files_cannot_be_locked_none_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(descriptor: int, kind: int) -> None:
        raise OSError("no locks here")

    monkeypatch.setattr(fcntl, "flock", refused)
    fill(tmp_path / "first", content(1))
    held = map_file(str(tmp_path / "first"))
    let_go(tmp_path / "first")
    fill(tmp_path / "second", content(2))
    assert (held == 1).all()


def test_no_more_than_one_is_kept_spare(tmp_path: Path) -> None:
    for number in range(4):
        fill(tmp_path / str(number), content(number))
    for number in range(4):
        let_go(tmp_path / str(number))
    let_go(tmp_path / "never there")
    assert len(list(tmp_path.iterdir())) == weight_files.SPARES == 1


def test_a_write_of_several_parts_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_files, "MOST_BYTES", 1000)
    data = np.random.default_rng(0).integers(0, 255, BYTES, dtype=np.uint8)
    fill(tmp_path / "first", data)
    assert np.array_equal(map_file(str(tmp_path / "first")), data)


def test_a_store_has_no_more_files_than_versions_and_one(tmp_path: Path) -> None:
    store = FileWeightStore(str(tmp_path), keep=2)
    inodes = set()
    for version in range(9):
        publish(store, version)
        inodes.add((tmp_path / f"version_{version:08d}.bin").stat().st_ino)
    assert newest(store) == 8
    assert len(inodes) == 3
    assert len(list(tmp_path.glob(f"{SPARE}*"))) == 1


def test_what_lies_on_the_stores_disk_is_not_sent_to_it(tmp_path: Path) -> None:
    class Counting(FileWeightStore):
        async def publish(self, manifest: Any, buffer: Any) -> None:
            raise AssertionError("the bytes were sent")

    store = Counting(str(tmp_path))
    near = NodeStore(store)

    async def main() -> None:
        for version in (1, 1, 2):
            await near.pour(Whole(*version_of(version)))
        with pytest.raises(WeightsError, match="versions are never reused"):
            await near.pour(Whole(*version_of(1, fill=7)))

    asyncio.run(main())
    assert store.versions == (1, 2) and newest(store) == 2
    assert not list(tmp_path.glob("*.tmp"))


def test_elsewhere_the_bytes_are_sent(tmp_path: Path) -> None:
    class Far(FileWeightStore):
        async def mark(self) -> str:
            return "/nowhere/store-0"

    store = Far(str(tmp_path))
    asyncio.run(NodeStore(store).pour(Whole(*version_of(3))))
    assert newest(store) == 3


def test_a_file_that_a_store_took_for_a_stray_is_written_again(tmp_path: Path) -> None:
    class Restarting(FileWeightStore):
        restarts = 0

        async def adopt(self, manifest: Any, path: str) -> None:
            if not self.restarts:
                self.restarts += 1
                os.unlink(path)
            await super().adopt(manifest, path)

    store = Restarting(str(tmp_path))
    asyncio.run(NodeStore(store).pour(Whole(*version_of(3))))
    assert newest(store) == 3


def test_a_file_of_another_length_is_refused(tmp_path: Path) -> None:
    store = FileWeightStore(str(tmp_path))
    manifest, buffer = version_of(1)
    temporary = temporary_of(tmp_path)
    fill(temporary, np.concatenate([buffer, buffer]))
    with pytest.raises(VersionGoneError, match="has 128 bytes, the manifest describes 64"):
        asyncio.run(store.adopt(manifest, str(temporary)))
    assert store.versions == () and not temporary.exists()


def test_a_newer_version_wakes_who_waits_for_it(tmp_path: Path) -> None:
    async def main() -> None:
        store = FileWeightStore(str(tmp_path))
        near = NodeStore(store)
        waiting = [asyncio.create_task(near.newer(than=than, wait_s=60)) for than in (-1, 1, 4)]
        await asyncio.sleep(0)
        await store.publish(*version_of(1))
        found = await waiting[0]
        assert found is not None and found.manifest.version == 1
        await near.pour(Whole(*version_of(5)))
        for task in waiting[1:]:
            found = await task
            assert found is not None and found.manifest.version == 5
            assert (mapped(found) == 5).all()
        assert await near.newer(than=5, wait_s=0.01) is None
        assert not store._waiting

    asyncio.run(main())


def test_elsewhere_a_newer_version_is_copied(tmp_path: Path) -> None:
    class Far(FileWeightStore):
        async def mark(self) -> str:
            return "/nowhere/store-0"

    async def main() -> None:
        store = Far(str(tmp_path))
        near = NodeStore(store)
        waiting = asyncio.create_task(near.newer(than=-1, wait_s=60))
        await asyncio.sleep(0)
        await store.publish(*version_of(2))
        found = await waiting
        assert found is not None and Path(found.path).parent != tmp_path
        assert (mapped(found) == 2).all()

    asyncio.run(main())
