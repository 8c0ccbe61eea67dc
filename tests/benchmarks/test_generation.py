"""Both arms of the generation benchmark generate what they are asked for, and count it alike."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import generation, ray_calls
from benchmarks.generation_arms import Ours
from benchmarks.generation_work import Setting, Work
from examples import tiny_model

WORK = Work(groups=16, group_size=8, max_tokens=12, stops=False)


def setting(directory: Path, engine: str) -> Setting:
    return Setting(
        model=str(directory / "model"),
        data=str(generation.DATA),
        directory=str(directory),
        slots=32,
        max_model_len=32,
        cores=tuple(os.sched_getaffinity(0)),
        engine=engine,
    )


@pytest.mark.parametrize("publish_every", [0, 1])
def test_ours_generates_every_group_to_its_end(tmp_path: Path, publish_every: int) -> None:
    ray_calls.table_model(tmp_path / "model")
    arm = Ours(setting(tmp_path, "table"))
    for _ in range(2):  # the engine stays, the worker and the queue are new
        done = arm.run(replace(WORK, publish_every=publish_every))
        assert done.tokens == 16 * 8 * 12
        assert done.details["most_unfinished"] >= 32  # as many as there are slots, or more
        assert publish_every or done.details["loads"] == 0  # of a burst so short, new weights may come too late


@pytest.mark.ray
def test_both_arms_sample_the_same_distribution(tmp_path: Path) -> None:
    tiny_model.build(tmp_path / "model")
    found: dict[str, list[int]] = {}
    with generation.processes(setting(tmp_path, "vllm")) as connections:
        for name, work in {"equal": WORK, "stops": replace(WORK, groups=64, stops=True)}.items():
            for arm, its in (("ours", work), ("raw", work), ("raw", replace(work, seeded=True))):
                connections[arm].send(its)
                found.setdefault(name, []).append(connections[arm].recv().tokens)
    assert found["equal"] == [16 * 8 * 12] * 3
    # 512 responses of at most 12 tokens: the standard error of their sum is below 512 ** 0.5 * 6 tokens.
    assert max(found["stops"]) < 512 * 12
    assert np.ptp(found["stops"]) < 6 * 2**0.5 * 512**0.5 * 6
