"""Adapters become whole weights: the right sum, of the right base, in a file that no reader sees change."""

import asyncio
import gc
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM

from millrace.actors.adapters import MergingStore, whole_weights
from millrace.actors.engines import engine as build_engine
from millrace.actors.engines.wiring import check_wiring, manifest_of, probe_sequences, score
from millrace.actors.weights import WeightReceiver
from millrace.core.errors import WeightsError
from millrace.core.protocols import Adapter, Manifest, Probe, WeightHandle
from millrace.core.weight_store import FileWeightStore
from millrace.core.weights import (
    VersionGoneError,
    buffer_bytes,
    digest_of,
    identity_of,
    layout,
    mapped,
    view_of,
    views,
)
from tests.core.test_weight_store_faults import Whole

SCALE, RANK = 0.5, 3
ADAPTED = ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight")


def llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=40, num_hidden_layers=2, max_position_embeddings=64, **sizes)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def base(tmp_path: Path) -> str:
    llama().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def factors(version: int, shape: tuple[int, ...]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    rng = np.random.default_rng([version, *shape])
    return tuple(rng.normal(size=size).astype(np.float32) * 0.3 for size in ((shape[0], RANK), (RANK, shape[1])))


def learner(version: int, seed: int = 0) -> LlamaForCausalLM:
    """What the learner holds at a version."""
    model = llama(seed)
    for name, parameter in model.named_parameters():
        if name in ADAPTED:
            b, a = map(torch.from_numpy, factors(version, tuple(parameter.shape)))
            parameter.add_(SCALE * (b @ a))
    return model


def adapter_version(version: int, *, dtype: str = "float32", seed: int = 0) -> tuple[Manifest, NDArray[np.uint8]]:
    named = dict(llama(seed).named_parameters())
    arrays: dict[str, NDArray[np.float32]] = {}
    for name in ADAPTED:
        arrays[f"{name}.lora_B"], arrays[f"{name}.lora_A"] = factors(version, tuple(named[name].shape))
    tensors = layout((name, "float32", array.shape) for name, array in arrays.items())
    buffer = np.zeros(buffer_bytes(tensors), np.uint8)
    for tensor in tensors:
        view_of(buffer, tensor)[:] = arrays[tensor.name]
    model = learner(version, seed)
    probes = [Probe(tokens_T=tokens, logprob_T=score(model, tokens)) for tokens in probe_sequences(model)]
    manifest = Manifest(
        version=version,
        step=version,
        epoch=1,
        tensors=tensors,
        digest=digest_of(buffer),
        probes=tuple(probes),
        adapter=Adapter(base=identity_of((n, p.numpy()) for n, p in named.items()), scale=SCALE, dtype=dtype),
    )
    return manifest, buffer


async def stored(folder: Path, *versions: int, **how: Any) -> FileWeightStore:
    store = FileWeightStore(str(folder / "weights"), keep=10)
    for version in versions:
        await store.publish(*adapter_version(version, **how))
    return store


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_outcome_is_base_plus_scaled_product_and_all_else_is_the_base(
    dtype: str, base: str, tmp_path: Path
) -> None:
    store = MergingStore(asyncio.run(stored(tmp_path, 1, dtype=dtype)), model=base)
    handle = asyncio.run(store.fetch(1))
    manifest = handle.manifest
    model = learner(1)
    assert [t.name for t in manifest.tensors] == [name for name, _ in model.named_parameters()]
    assert manifest.adapter is None and manifest.digest == digest_of(mapped(handle))
    assert (manifest.version, manifest.step, manifest.epoch, len(manifest.probes)) == (1, 1, 1, 4)
    for name, parameter in model.named_parameters():
        held = torch.from_numpy(np.array(views(handle)[name]))
        held = held.view(torch.bfloat16) if dtype == "bfloat16" else held
        expected = parameter.to(getattr(torch, dtype))
        if name in ADAPTED:
            torch.testing.assert_close(held, expected)
        else:
            assert torch.equal(held, expected)


def test_a_reader_of_one_version_never_sees_the_next(base: str, tmp_path: Path) -> None:
    async def work() -> None:
        store = MergingStore(await stored(tmp_path, *range(4)), model=base)
        before = await store.fetch(0)
        held = mapped(before)
        bytes_before = np.array(held)
        after = await store.fetch(1)
        assert after.path != before.path
        assert np.array_equal(held, bytes_before)
        third = await store.fetch(2)
        assert third.path == before.path, "two files alternate"
        assert (await store.fetch(2)) is third, "the same version is not merged again"
        fresh = MergingStore(await stored(tmp_path, 2), model=base)
        assert (await fresh.fetch(2)).manifest.digest == third.manifest.digest, "nothing of version 0 is left in it"

    asyncio.run(work())


def test_other_processes_open_the_file_and_nothing_is_left_behind(base: str, tmp_path: Path) -> None:
    store = MergingStore(asyncio.run(stored(tmp_path, 1)), model=base)
    handle = asyncio.run(store.fetch(1))
    reading = [
        sys.executable,
        "-c",
        "import sys, xxhash; print(xxhash.xxh3_128_hexdigest(open(sys.argv[1], 'rb').read()))",
    ]
    digest = subprocess.run([*reading, handle.path], capture_output=True, text=True, check=True).stdout.strip()
    assert digest == handle.manifest.digest
    del store
    gc.collect()
    with pytest.raises(VersionGoneError):
        mapped(handle)
    for folder in ("/dev/shm", tempfile.gettempdir()):
        assert not list(Path(folder).glob("millrace-weights-*")), "a killed process could not have removed it"


def test_another_base_is_refused(base: str, tmp_path: Path) -> None:
    async def work() -> None:
        llama(7).save_pretrained(tmp_path / "other")
        store = await stored(tmp_path, 1)
        other = str(tmp_path / "other")
        with pytest.raises(WeightsError, match=r"version 1 is an adapter of a base model with weights \w{12}, .*other"):
            await MergingStore(store, model=other).fetch(1)
        with pytest.raises(WeightsError, match="is an adapter, but this engine's base model is not known"):
            await whole_weights(store, object()).fetch(1)  # type: ignore[arg-type]
        assert (await whole_weights(store, {"name": "x", "model": base}).fetch(1)).manifest.adapter is None

    asyncio.run(work())


def test_what_does_not_fit_the_base_is_refused(base: str, tmp_path: Path) -> None:
    async def work() -> None:
        manifest, buffer = adapter_version(1)
        for folder, change, message in (
            (
                "name",
                lambda name: name.replace("q_proj", "z_proj"),
                "has an adapter of .*z_proj.weight, which .* has not",
            ),
            (
                "alone",
                lambda name: name.replace("q_proj.weight.lora_A", "k_proj.weight.lora_A"),
                "k_proj.weight.lora_. stands alone",
            ),
        ):
            tensors = tuple(replace(tensor, name=change(tensor.name)) for tensor in manifest.tensors)
            store = FileWeightStore(str(tmp_path / folder))
            await store.publish(replace(manifest, tensors=tensors), buffer)
            with pytest.raises(WeightsError, match=message):
                await MergingStore(store, model=base).fetch(1)

    asyncio.run(work())


def test_damaged_bytes_are_refused(base: str, tmp_path: Path) -> None:
    async def work() -> None:
        store = await stored(tmp_path, 1)
        path = Path((await store.fetch(1)).path)
        data = bytearray(path.read_bytes())
        data[10] ^= 1
        path.write_bytes(data)
        with pytest.raises(WeightsError, match="was changed or damaged"):
            await MergingStore(store, model=base).fetch(1)

    asyncio.run(work())


def test_whole_versions_pass_through(tmp_path: Path) -> None:
    async def work() -> None:
        model = llama()
        manifest, buffer = manifest_of(model, [], version=4, dtype="float32", tolerance=1e-4)
        store = FileWeightStore(str(tmp_path / "weights"))
        merging = MergingStore(store, model="no/such/directory")
        assert await merging.pour(Whole(manifest, buffer)) == manifest
        assert await merging.fetch(4) == await store.fetch(4)

    asyncio.run(work())


def test_a_version_deleted_before_it_is_merged_is_fetched_again(base: str, tmp_path: Path) -> None:
    async def work() -> None:
        store = await stored(tmp_path, 1, 2)
        gone = await store.fetch(1)
        Path(gone.path).unlink()
        asked: list[int] = []

        class Late:
            async def fetch(self, version: int) -> WeightHandle:
                asked.append(version)
                return gone if len(asked) < 3 else await store.fetch(2)

        assert (await MergingStore(Late(), model=base).fetch(1)).manifest.version == 2  # type: ignore[arg-type]
        assert asked == [1, 1, 1]
        Late.fetch = lambda self, version: asyncio.sleep(0, gone)  # type: ignore[method-assign,assignment]
        with pytest.raises(WeightsError, match="deleted before they could be merged: keep more versions"):
            await MergingStore(Late(), model=base).fetch(1)  # type: ignore[arg-type]

    asyncio.run(work())
    assert issubclass(VersionGoneError, WeightsError)


def test_an_engine_follows_adapters_and_computes_what_the_learner_does(base: str, tmp_path: Path) -> None:
    """Every proof of whole weights holds: names, digest, probes; and so does the check of the wiring."""

    async def work() -> None:
        options = {"name": "transformers", "model": base, "slots": 4, "max_model_len": 64}
        engine = build_engine(**options)
        await check_wiring(engine, base)
        store = await stored(tmp_path, 0, 1, 2)
        receiver = WeightReceiver(engine, whole_weights(store, options), probe_every=1)
        for version in (0, 1, 2):
            proof = await receiver.follow(version)
            assert proof is not None and proof.version == version
            assert proof.probe_gap is not None and proof.probe_gap < 1e-5
            tokens = np.arange(1, 30, dtype=np.int32)
            assert np.abs(await engine.score(tokens) - score(learner(version), tokens)).max() < 1e-5
        manifest, buffer = adapter_version(3)
        wrong = replace(manifest, adapter=replace(manifest.adapter, scale=0.6))  # type: ignore[type-var]
        await store.publish(wrong, buffer)
        with pytest.raises(WeightsError, match="version 3: probe 0, token .* were published: gap"):
            await receiver.follow(3)
        await engine.close()

    asyncio.run(work())
