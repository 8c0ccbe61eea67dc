"""Calls are counted where they arrive."""

import asyncio
from pathlib import Path

import pytest

from benchmarks import ray_calls


class Component:
    """A component with public and private methods."""

    def __init__(self, start: int) -> None:
        self.total = start

    async def add(self, many: int) -> int:
        self.total += many
        return await self._total()

    async def _total(self) -> int:
        return self.total


def test_a_component_is_called_as_before_and_its_calls_are_counted() -> None:
    async def use() -> tuple[int, dict[str, int]]:
        process = ray_calls.Counting(Component, (3,), {})
        await process.call("add", (), {"many": 1})
        return await process.call("add", (2,), {}), await process.call("received_calls", (), {})

    assert asyncio.run(use()) == (6, {"add": 2})


@pytest.mark.ray
def test_a_run_counts_more_than_its_queue_sees(tmp_path: Path) -> None:
    settings = ["loop.steps=2", "loop.groups_per_step=4", "data.held_out_limit=2", "evaluation.every=2"]
    found, details = ray_calls.measure(ray_calls.settled(tmp_path, 1024, settings))
    by_actor = details["by_actor"]
    assert isinstance(by_actor, dict)
    assert details["trained_rollouts"] == 2 * 4 * 8
    assert by_actor["queue"]["trained"] == 2
    assert by_actor["weights"]["adopt"] == 3
    assert by_actor["learner"]["run"] == by_actor["held-out"]["run"] == by_actor["generation-0"]["run"] == 1
    assert found > float(str(details["as_result_json_says"])) > 0
    calls = sum(sum(counts.values()) for counts in by_actor.values()) + len(by_actor)
    assert found == pytest.approx(calls / 64)
