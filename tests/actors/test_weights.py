"""The receiving end: newest wins, never backwards, proofs when they are due, failures are fatal."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from millrace.actors.weights import WeightReceiver, check_names, check_probes, probe_gap
from millrace.core.errors import WeightsError
from millrace.core.protocols import Manifest, Probe, Proof, WeightHandle
from millrace.core.types import Floats, Ints
from millrace.core.weight_store import FileWeightStore
from millrace.core.weights import VersionGoneError, buffer_bytes, digest_of, layout

TENSORS = layout([("a", "float32", (4,)), ("b", "float32", (2, 2))])


def manifest_of(version: int, *, probes: bool = True) -> Manifest:
    buffer = np.full(buffer_bytes(TENSORS), version % 256, np.uint8)
    probe = Probe(tokens_T=np.array([1, 2, 3], np.int32), logprob_T=np.array([-1.0, -2.0], np.float32))
    return Manifest(
        version=version,
        step=version,
        epoch=0,
        tensors=TENSORS,
        digest=digest_of(buffer),
        probes=(probe,) if probes else (),
    )


class FakeStore:
    """Versions that take as long to fetch as the test says."""

    def __init__(self, *versions: int, probes: Callable[[int], bool] = lambda _: True) -> None:
        self.versions = list(versions)
        self.asked: list[int] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.probes = probes

    async def pour(self, packing: Any) -> Manifest:
        raise NotImplementedError

    async def fetch(self, version: int) -> WeightHandle:
        self.asked.append(version)
        await self.gate.wait()
        found = version if version in self.versions else max(self.versions)
        return WeightHandle(manifest=manifest_of(found, probes=self.probes(found)), path=f"/nowhere/{found}")

    async def newer(self, *, than: int, wait_s: float) -> WeightHandle | None:
        if max(self.versions) <= than:
            return None
        return WeightHandle(manifest=manifest_of(max(self.versions)), path="/nowhere")


class FakeEngine:
    """Remembers what it was asked to load."""

    def __init__(self) -> None:
        self.version = -1
        self.loaded: list[tuple[int, bool]] = []
        self.change: Callable[[Proof], Proof] = lambda proof: proof
        self.gone = 0

    async def load(self, weights: WeightHandle, *, prove: bool) -> Proof:
        await asyncio.sleep(0)
        if self.gone:
            self.gone -= 1
            raise VersionGoneError("deleted")
        manifest = weights.manifest
        self.version = manifest.version
        self.loaded.append((manifest.version, prove))
        gap = 1e-7 if prove and manifest.probes else None
        names = frozenset(tensor.name for tensor in manifest.tensors)
        return self.change(Proof(version=manifest.version, digest=manifest.digest, consumed=names, probe_gap=gap))


def receiver(engine: Any, store: Any, probe_every: int = 3) -> WeightReceiver:
    return WeightReceiver(engine, store, probe_every=probe_every)


def test_follow_brings_the_engine_there_and_never_back() -> None:
    async def work() -> None:
        engine, store = FakeEngine(), FakeStore(0, 1, 2)
        subject = receiver(engine, store)
        assert (await subject.follow(1)).version == 1  # type: ignore[union-attr]
        assert await subject.follow(1) is None
        assert await subject.follow(0) is None
        assert store.asked == [1]
        assert (await subject.follow(2)).version == 2  # type: ignore[union-attr]
        assert [version for version, _ in engine.loaded] == [1, 2]

    asyncio.run(work())


def test_a_store_that_only_has_older_ones_changes_nothing() -> None:
    async def work() -> None:
        engine, store = FakeEngine(), FakeStore(3)
        subject = receiver(engine, store)
        await subject.follow(3)
        assert await subject.follow(7) is None
        assert engine.version == 3

    asyncio.run(work())


def test_the_first_load_and_every_kth_is_proved() -> None:
    async def work() -> None:
        engine = FakeEngine()
        subject = receiver(engine, FakeStore(*range(8)), probe_every=3)
        for version in range(8):
            await subject.follow(version)
        assert [prove for _, prove in engine.loaded] == [True, False, False, True, False, False, True, False]

    asyncio.run(work())


def test_a_due_proof_waits_for_a_version_with_probes() -> None:
    async def work() -> None:
        engine = FakeEngine()
        subject = receiver(engine, FakeStore(*range(8), probes=lambda version: version in (2, 6)), probe_every=3)
        for version in range(8):
            await subject.follow(version)
        assert [prove for _, prove in engine.loaded] == [True, True, True, False, False, True, True, False]

    asyncio.run(work())


def test_overtaken_while_fetching_skips_to_the_newest() -> None:
    async def work() -> None:
        engine, store = FakeEngine(), FakeStore(0, 1, 2, 3)
        store.gate.clear()
        subject = receiver(engine, store)
        follows = [asyncio.create_task(subject.follow(version)) for version in (0, 1, 3)]
        await asyncio.sleep(0.01)
        store.gate.set()
        answers = await asyncio.gather(*follows)
        assert [version for version, _ in engine.loaded] == [3]
        assert [None if answer is None else answer.version for answer in answers] == [3, None, None]
        assert subject.skipped == 1

    asyncio.run(work())


def test_a_fetch_slower_than_publishing_still_loads() -> None:
    async def work() -> None:
        engine = FakeEngine()

        class Racing(FakeStore):
            async def fetch(self, version: int) -> WeightHandle:
                self.versions.append(version + 1)
                subject._wanted = version + 1  # another is announced during every fetch
                return await super().fetch(version)

        subject = receiver(engine, Racing(0))
        await subject.follow(0)
        assert len(engine.loaded) == 1

    asyncio.run(work())


def test_what_was_heard_of_is_not_fetched_again_and_the_newest_wins() -> None:
    async def work() -> None:
        engine, store = FakeEngine(), FakeStore(4)
        subject = receiver(engine, store)
        assert await subject.hear(wait_s=1) == 4
        assert await subject.hear(wait_s=1) == -1, "it is known"
        assert (await subject.follow(3)).version == 4  # type: ignore[union-attr]
        assert store.asked == []
        store.versions.append(6)
        assert await subject.hear(wait_s=1) == 6
        store.versions.append(7)
        assert (await subject.follow(7)).version == 7  # type: ignore[union-attr]
        assert store.asked == [7]
        assert await subject.hear(wait_s=1) == -1

    asyncio.run(work())


def test_a_version_deleted_under_the_engine_is_fetched_again() -> None:
    async def work() -> None:
        engine, store = FakeEngine(), FakeStore(0, 1)
        engine.gone = 2
        await receiver(engine, store).follow(1)
        assert engine.loaded == [(1, True)]
        assert len(store.asked) == 3
        engine.gone = 9
        store.versions.append(2)
        with pytest.raises(WeightsError, match="keep more versions"):
            await receiver(engine, store).follow(2)

    asyncio.run(work())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: Proof(version=9, digest=p.digest, consumed=p.consumed), "answers version 9"),
        (lambda p: Proof(version=p.version, digest="0" * 64, consumed=p.consumed), "digest 000000000000"),
        (
            lambda p: Proof(version=p.version, digest=p.digest, consumed=frozenset({"a", "c"})),
            r"left aside: b; unknown: c",
        ),
    ],
)
def test_a_wrong_answer_is_fatal(change: Callable[[Proof], Proof], message: str) -> None:
    engine = FakeEngine()
    engine.change = change
    with pytest.raises(WeightsError, match=message):
        asyncio.run(receiver(engine, FakeStore(0)).follow(0))


def test_probe_every_must_be_positive() -> None:
    with pytest.raises(WeightsError, match="probe_every = 0"):
        receiver(FakeEngine(), FakeStore(0), probe_every=0)


@pytest.mark.parametrize("off", [2e-4, -2e-4, float("nan")])
def test_a_probe_that_is_off_names_token_gap_and_tolerance(off: float) -> None:
    scored = np.array([-1.0, -2.0 + off], np.float32)
    with pytest.raises(
        WeightsError, match=r"version 5: probe 0, token 2 .* gap (2\.\d\de-04|nan) nats, tolerance 1e-04"
    ):
        check_probes(manifest_of(5), [scored])


def test_probes_longer_than_the_engine_are_compared_in_part() -> None:
    async def score(tokens_T: Ints) -> Floats:
        assert len(tokens_T) == 2
        return np.array([-1.00005], np.float32)

    gap = asyncio.run(probe_gap(manifest_of(0), score, longest=2))
    assert gap == pytest.approx(5e-5, rel=1e-2)
    assert asyncio.run(probe_gap(manifest_of(0, probes=False), score, longest=2)) is None


def test_names_are_shown_in_part() -> None:
    with pytest.raises(WeightsError, match=r"unknown: n0, n1, n2, n3, n4 and 15 more"):
        check_names(manifest_of(0), frozenset({"a", "b", *(f"n{i}" for i in range(5)), *(f"o{i}" for i in range(15))}))


def test_with_the_real_store(tmp_path: Path) -> None:
    async def work() -> None:
        store = FileWeightStore(str(tmp_path))
        engine = FakeEngine()
        subject = receiver(engine, store)
        with pytest.raises(WeightsError, match="no weights were published"):
            await subject.follow(0)
        for version in range(4):
            await store.publish(manifest_of(version), np.full(buffer_bytes(TENSORS), version, np.uint8))
        await subject.follow(0)  # gone already: the newest
        assert engine.version == 3

    asyncio.run(work())
