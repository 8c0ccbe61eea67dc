"""The on-disk format of published weights, and the store: atomic, ordered, bounded, reloadable."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from millrace.core.errors import WeightsError
from millrace.core.protocols import Adapter, Manifest, Probe, WeightHandle
from millrace.core.weight_store import FileWeightStore
from millrace.core.weights import (
    VersionGoneError,
    buffer_bytes,
    digest_of,
    factors_of,
    from_json,
    identity_of,
    layout,
    map_file,
    mapped,
    to_json,
    views,
)

NAMED = [
    ("embedding", "float32", (5, 3)),
    ("norm", "bfloat16", (7,)),
    ("head", "float16", (2, 2)),
    ("scalar", "float32", ()),
]


def published(version: int, *, fill: int | None = None) -> tuple[Manifest, NDArray[np.uint8]]:
    tensors = layout(NAMED)
    buffer = np.random.default_rng(version if fill is None else fill).integers(
        0, 255, buffer_bytes(tensors), dtype=np.uint8
    )
    probe = Probe(tokens_T=np.array([1, 2, 3], np.int32), logprob_T=np.array([-0.1, -1.0 / 3], np.float32))
    manifest = Manifest(
        version=version, step=version * 2, epoch=1, tensors=tensors, digest=digest_of(buffer), probes=(probe,)
    )
    return manifest, buffer


def publish(store: FileWeightStore, *versions: int) -> None:
    for version in versions:
        asyncio.run(store.publish(*published(version)))


def fetch(store: FileWeightStore, version: int) -> WeightHandle:
    return asyncio.run(store.fetch(version))


def test_layout_is_aligned_and_does_not_overlap() -> None:
    tensors = layout(NAMED)
    ends = [0, *(tensor.offset + tensor.size for tensor in tensors)]
    assert all(tensor.offset % 64 == 0 for tensor in tensors)
    assert all(tensor.offset >= end for tensor, end in zip(tensors, ends, strict=False))
    assert [tensor.size for tensor in tensors] == [60, 14, 8, 4]


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ([("a", "int8", (2,))], "parameter a has dtype int8: publish one of float32, bfloat16, float16"),
        ([("a", "float32", (2,)), ("a", "float32", (2,))], "parameter a appears twice"),
    ],
)
def test_layout_refuses(named: list[tuple[str, str, tuple[int, ...]]], message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        layout(named)


def test_views_hold_the_published_bytes(tmp_path: Path) -> None:
    manifest, buffer = published(3)
    store = FileWeightStore(str(tmp_path))
    asyncio.run(store.publish(manifest, buffer))
    seen = views(fetch(store, 3))
    assert {name: (array.dtype.name, array.shape) for name, array in seen.items()} == {
        "embedding": ("float32", (5, 3)),
        "norm": ("uint16", (7,)),
        "head": ("float16", (2, 2)),
        "scalar": ("float32", ()),
    }
    for tensor in manifest.tensors:
        assert seen[tensor.name].tobytes() == buffer[tensor.offset : tensor.offset + tensor.size].tobytes()
    with pytest.raises(ValueError, match="read-only"):
        seen["embedding"][0, 0] = 1


def test_a_manifest_survives_json_to_the_last_bit() -> None:
    manifest, _ = published(4)
    back = from_json(to_json(manifest), source="here")
    assert back.tensors == manifest.tensors
    assert (back.version, back.step, back.epoch, back.digest, back.tolerance) == (4, 8, 1, manifest.digest, 1e-4)
    np.testing.assert_array_equal(back.probes[0].logprob_T, manifest.probes[0].logprob_T)
    np.testing.assert_array_equal(back.probes[0].tokens_T, manifest.probes[0].tokens_T)


def test_an_adapter_is_said_in_the_manifest() -> None:
    manifest, _ = published(4)
    assert from_json(to_json(manifest), source="here").adapter is None
    adapter = Adapter(base="ab" * 32, scale=1 / 3, dtype="bfloat16")
    assert from_json(to_json(replace(manifest, adapter=adapter)), source="here").adapter == adapter


def test_manifests_of_before_adapters_are_read() -> None:
    data = json.loads(to_json(published(4)[0]))
    del data["adapter"]
    assert from_json(json.dumps(data), source="here").adapter is None


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ([("w.lora_A", (2, 3))], "w.lora_. stands alone"),
        ([("w", (2, 3))], "stands alone"),
        ([("w.lora_A", (2, 3)), ("v.lora_B", (3, 2))], "stands alone"),
        ([("w.lora_A", (2, 3)), ("w.lora_B", (4, 3))], r"adapter of w: \[4, 3\] times \[2, 3\] is no product"),
        ([("w.lora_A", (2,)), ("w.lora_B", (4, 2))], r"is no product"),
    ],
)
def test_factors_come_in_pairs_that_multiply(named: list[tuple[str, tuple[int, ...]]], message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        factors_of(layout((name, "float32", shape) for name, shape in named))


def test_the_identity_notices_names_shapes_and_values() -> None:
    zeros = np.zeros((2, 3), np.float32)
    changes = [("b", zeros), ("a", zeros.T), ("a", zeros.reshape(6)), ("a", zeros - np.float32(1e-38))]
    identities = {identity_of([each]) for each in [("a", zeros), *changes]}
    assert len(identities) == 5
    assert identity_of([("a", np.zeros((3, 2), np.float32).T)]) == identity_of([("a", zeros)]), "of the values alone"


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"version": 1}', "null"])
def test_a_damaged_manifest_is_named(text: str) -> None:
    with pytest.raises(WeightsError, match=r"here: not a weight manifest \("):
        from_json(text, source="here")


def test_publish_verifies_the_digest(tmp_path: Path) -> None:
    manifest, buffer = published(0)
    buffer[5] ^= 1
    with pytest.raises(WeightsError, match=r"version 0: the bytes have digest .* changed on the way"):
        asyncio.run(FileWeightStore(str(tmp_path)).publish(manifest, buffer))
    assert not list(tmp_path.glob("version_*"))


def test_publish_refuses_a_short_buffer(tmp_path: Path) -> None:
    manifest, buffer = published(0)
    with pytest.raises(WeightsError, match="the manifest describes 256 bytes"):
        asyncio.run(FileWeightStore(str(tmp_path)).publish(manifest, buffer[:-64]))


@pytest.mark.parametrize("version", [5, 4])
def test_versions_are_never_reused_for_other_bytes(tmp_path: Path, version: int) -> None:
    store = FileWeightStore(str(tmp_path))
    publish(store, 5)
    other = published(version, fill=99)
    with pytest.raises(WeightsError, match=f"version {version} cannot be published: version 5 was"):
        asyncio.run(store.publish(*other))
    with pytest.raises(WeightsError, match="cannot be published"):
        asyncio.run(FileWeightStore(str(tmp_path)).publish(*other))


def test_a_repeated_publish_is_the_same_publish(tmp_path: Path) -> None:
    store = FileWeightStore(str(tmp_path))
    publish(store, 5, 5)
    publish(FileWeightStore(str(tmp_path)), 5)
    assert store.versions == (5,)


def test_the_last_versions_are_kept_and_the_newest_stands_in(tmp_path: Path) -> None:
    store = FileWeightStore(str(tmp_path), keep=2)
    publish(store, 0, 1, 5)
    assert store.versions == (1, 5)
    assert fetch(store, 1).manifest.version == 1
    assert fetch(store, 0).manifest.version == 5
    assert fetch(store, 9).manifest.version == 5
    assert len(list(tmp_path.glob("version_*"))) == 4


def test_nothing_published(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no weights were published yet"):
        fetch(FileWeightStore(str(tmp_path)), 0)


def test_a_mapped_version_survives_its_deletion(tmp_path: Path) -> None:
    store = FileWeightStore(str(tmp_path), keep=1)
    publish(store, 0)
    handle = fetch(store, 0)
    held = mapped(handle)
    publish(store, 1)
    assert digest_of(held) == handle.manifest.digest
    with pytest.raises(VersionGoneError, match="deleted before it was mapped"):
        mapped(handle)


def test_copy_on_write_leaves_the_file_alone(tmp_path: Path) -> None:
    store = FileWeightStore(str(tmp_path))
    publish(store, 0)
    handle = fetch(store, 0)
    map_file(handle.path, mode="c")[:] = 0
    assert digest_of(mapped(handle)) == handle.manifest.digest


def test_reload_takes_whole_versions_and_says_why_not_the_others(tmp_path: Path) -> None:
    publish(FileWeightStore(str(tmp_path), keep=9), 1, 2, 3, 4, 5, 6)
    (tmp_path / "version_00000002.bin").write_bytes(b"short")
    flipped = bytearray((tmp_path / "version_00000003.bin").read_bytes())
    flipped[0] ^= 255
    (tmp_path / "version_00000003.bin").write_bytes(flipped)
    (tmp_path / "version_00000004.bin").unlink()
    (tmp_path / "version_00000005.json").unlink()  # its writer ended between the two renames
    (tmp_path / "version_00000006.json").write_text("{")
    (tmp_path / "version_00000007.12.34.tmp").write_bytes(b"half")
    store = FileWeightStore(str(tmp_path), keep=9)
    assert store.versions == (1,)
    reasons = {name.split(".")[0][-1]: reason for name, reason in store.ignored.items()}
    assert "the manifest describes 256" in reasons["2"]
    assert "do not have the manifest's digest" in reasons["3"]
    assert "deleted" in reasons["4"]
    assert "being written" in reasons["5"]
    assert "not a weight manifest" in reasons["6"]
    assert "being written" in reasons["7"]
    with pytest.raises(WeightsError, match="version 6 was"):
        publish(store, 6)
    publish(store, 7)
    assert fetch(store, 7).manifest.version == 7


def test_the_manifest_is_written_after_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    renamed: list[str] = []
    rename = Path.rename

    def record(self: Path, target: Path) -> Path:
        renamed.append(target.suffix)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", record)
    publish(FileWeightStore(str(tmp_path)), 0)
    assert renamed == [".bin", ".json"]


class CountingUpstream:
    """A store on another machine."""

    def __init__(self, store: FileWeightStore) -> None:
        self.store = store
        self.reads = 0

    async def read(self, version: int) -> tuple[str, NDArray[np.uint8]]:
        self.reads += 1
        await asyncio.sleep(0)
        return await self.store.read(version)


def test_another_machine_pulls_once_and_keeps(tmp_path: Path) -> None:
    origin = FileWeightStore(str(tmp_path / "origin"))
    publish(origin, 0, 1, 2)
    upstream = CountingUpstream(origin)
    cache = FileWeightStore(str(tmp_path / "cache"), upstream=upstream)

    async def both() -> list[WeightHandle]:
        return await asyncio.gather(cache.fetch(2), cache.fetch(2))

    first, second = asyncio.run(both())
    assert first == second
    assert first.path.startswith(str(tmp_path / "cache"))
    assert upstream.reads == 1
    assert digest_of(mapped(first)) == published(2)[0].digest
    asyncio.run(cache.fetch(2))
    assert upstream.reads == 1
    assert asyncio.run(cache.fetch(0)).manifest.version == 2  # gone at the origin: the newest


def test_damage_on_the_way_is_found(tmp_path: Path) -> None:
    origin = FileWeightStore(str(tmp_path / "origin"))
    publish(origin, 0)

    class Damaging(CountingUpstream):
        async def read(self, version: int) -> tuple[str, NDArray[np.uint8]]:
            text, buffer = await super().read(version)
            buffer[0] ^= 1
            return text, buffer

    cache = FileWeightStore(str(tmp_path / "cache"), upstream=Damaging(origin))
    with pytest.raises(WeightsError, match="changed on the way"):
        asyncio.run(cache.fetch(0))


def test_json_beside_the_buffer_is_plain(tmp_path: Path) -> None:
    publish(FileWeightStore(str(tmp_path)), 0)
    data = json.loads((tmp_path / "version_00000000.json").read_text())
    assert data["tensors"][0] == {"name": "embedding", "dtype": "float32", "shape": [5, 3], "offset": 0, "size": 60}
