"""Held-out evaluation that dies, and whoever takes over."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from millrace.cluster import held_out
from millrace.cluster.held_out import HeldOut
from millrace.core.errors import EngineDeadError
from millrace.core.protocols import Manifest
from millrace.core.weight_store import FileWeightStore
from millrace.core.weights import digest_of, layout


class Evaluates:
    """In place of an evaluator: the evaluation of a version is its number."""

    begun: list[int]
    dies_at = -1

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    async def evaluate(self, version: int) -> int:
        self.begun.append(version)
        if version == self.dies_at:
            raise EngineDeadError("process 7 has ended")
        return version

    async def close(self) -> None:
        pass


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[HeldOut, FileWeightStore]]:
    monkeypatch.setattr(held_out, "Evaluator", Evaluates)
    monkeypatch.setattr(held_out, "POLL_S", 0.001)
    monkeypatch.setattr(Evaluates, "begun", [], raising=False)
    monkeypatch.setattr(Evaluates, "dies_at", -1)

    def build(**store: Any) -> tuple[HeldOut, FileWeightStore]:
        built = FileWeightStore(str(tmp_path), hold_every=2)
        unused: Any = None
        return HeldOut("held-out", store=built, engine={}, prompts=(), judge=unused, config=unused), built  # type: ignore[arg-type]  # NodeStore adds machines alone

    return build


def publish(store: FileWeightStore, *versions: int) -> None:
    tensors = layout([("w", "float32", (4,))])
    for version in versions:
        buffer = np.full(64, version, np.uint8)
        manifest = Manifest(version=version, step=version, epoch=1, tensors=tensors, digest=digest_of(buffer))
        asyncio.run(store.publish(manifest, buffer))


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


def test_what_was_pending_is_made_again_by_the_successor(make: Any) -> None:
    first, store = make()
    publish(store, *range(5))
    Evaluates.dies_at = 2
    with pytest.raises(EngineDeadError):
        asyncio.run(first.run())
    Evaluates.dies_at = -1
    successor, store = make()  # and the store was made again, too

    async def whole() -> Any:
        await successor.finish()
        await successor.run()
        return await successor.results(after=0)

    # The first has evaluated version 0, but nobody has collected that.
    assert asyncio.run(whole()) == [0, 2, 4]
    assert Evaluates.begun == [0, 2, 0, 2, 4]


def test_a_version_is_let_go_when_its_evaluation_was_collected(make: Any) -> None:
    component, store = make()
    publish(store, *range(5))

    async def whole() -> None:
        running = asyncio.create_task(component.run())
        await until(lambda: Evaluates.begun == [0, 2, 4])
        assert await component.results(after=0) == [0, 2, 4]  # on its way: perhaps it never arrives
        await asyncio.sleep(0.02)
        assert await store.held() == (0, 2, 4)
        assert await component.results(after=2) == [4]
        await until(lambda: store.versions == (3, 4))
        assert await store.held() == (4,)
        await component.finish()
        await running
        assert await store.held() == (4,)
        await component.close()  # the run has all
        assert await store.held() == ()

    asyncio.run(whole())
    assert Evaluates.begun == [0, 2, 4]


def test_a_store_that_is_restarted_meanwhile_is_asked_again(make: Any) -> None:
    component, store = make()
    publish(store, 0)
    held, calls = store.held, []

    async def flaky() -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise ConnectionError("weights is gone")
        return await held()

    store.held = flaky

    async def whole() -> None:
        await component.finish()
        await component.run()

    asyncio.run(whole())
    assert Evaluates.begun == [0]
