"""A resumed run is the run that was not interrupted: redone steps at any lag, whole runs at max_lag = 0. To the bit."""

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from examples import tiny_model
from tests.faults import invariants
from tests.faults.harness import Ended, Scene, run_here
from tests.faults.leaks import nothing_left

pytestmark = pytest.mark.ray

STEPS = 16
SYNCHRONOUS = {"steps": STEPS, "max_lag": 0}


def weights_of(ended: Ended) -> dict[int, str]:
    """Step -> digest of the weights that were published after it, in the surviving history."""
    return {row["step"]: row["weights"] for row in ended.steps}


def killed_and_resumed(config: Any, *, steps: tuple[int, ...], local: bool) -> Ended:
    """Kill -9 of the driver at each of these steps, and on from there."""
    resume = False
    for step in steps:
        with nothing_left(), Scene.start(config, local=local, resume=resume) as scene:
            status = scene.until(lambda status, step=step: status if status.step >= step else None)
            os.kill(status.pid, signal.SIGKILL)
            while not scene.job.ended:
                time.sleep(0.05)
        resume = True
    with nothing_left(), Scene.start(config, local=local, resume=True) as scene:
        return scene.end()


def same(one: Mapping[int, str], other: Mapping[int, str], *, steps: int) -> None:
    assert sorted(one) == sorted(other) == list(range(1, steps + 1))
    differ = [step for step in one if one[step] != other[step]]
    assert not differ, f"the weights differ from step {differ[0]} on"


@pytest.mark.parametrize("steps", [(5,), pytest.param((2, 7, 11), marks=pytest.mark.faults)], ids=str)
def test_a_synchronous_run_whose_driver_is_killed_ends_with_the_same_weights(make_run: Any, steps: Any) -> None:
    slow = {"engine": {"name": "table", "token_delay_s": 0.02, "chunk_tokens": 1}}
    whole = run_here(make_run("whole", loop=SYNCHRONOUS))
    ended = killed_and_resumed(make_run("halves", loop=SYNCHRONOUS, generation=slow), steps=steps, local=True)
    invariants.hold(ended)
    same(weights_of(whole), weights_of(ended), steps=STEPS)


@pytest.mark.faults
def test_the_same_with_the_transformers_engine_on_ray(make_run: Any, tmp_path: Path) -> None:
    tiny_model.build(tmp_path / "model")
    sections: dict[str, Any] = {
        "model": str(tmp_path / "model"),
        "loop": {**SYNCHRONOUS, "steps": 10},
        "generation": {"engine": {"name": "transformers", "batch_invariant": True}},
        "learner": {"learning_rate": 1e-3},
    }
    whole = run_here(make_run("whole", **sections))
    ended = killed_and_resumed(make_run("halves", **sections), steps=(3, 6), local=False)
    invariants.hold(ended)
    same(weights_of(whole), weights_of(ended), steps=10)


@pytest.mark.faults
def test_killed_components_leave_no_trace_in_a_synchronous_run(paced_run: Any, make_run: Any) -> None:
    whole = run_here(make_run("whole", loop={**SYNCHRONOUS, "steps": 40}))
    hits = []
    with nothing_left(), Scene.start(paced_run("hit", loop={**SYNCHRONOUS, "steps": 40})) as scene:
        for step, kind in ((3, "generation-0"), (6, "learner"), (9, "queue"), (12, "reward-0"), (15, "weights")):
            scene.until(step=step)
            hits.append(scene.kill(kind))
            scene.back(hits[-1])
        ended = scene.end()
    invariants.hold(ended, hits=hits)
    same(weights_of(whole), weights_of(ended), steps=40)


@pytest.mark.faults
def test_redone_steps_of_an_asynchronous_run_are_those_of_the_first_time(paced_run: Any) -> None:
    """Every published version that stands for a step, over all learners of a run, has the same bytes."""
    with nothing_left(), Scene.start(paced_run("hit", learner={"checkpoint_every": 7})) as scene:
        seen: dict[int, set[str]] = {}

        def collect() -> None:
            for row in Ended.of(scene.directory).steps:
                seen.setdefault(row["step"], set()).add(row["weights"])

        hits = []
        for step in (5, 12, 19):
            scene.until(step=step)
            collect()
            hits.append(scene.kill("learner"))
            scene.back(hits[-1])
        ended = scene.end()
        collect()
    invariants.hold(ended, hits=hits)
    made_twice = [row["step"] for row in ended.steps if any(row["step"] <= step for step in (5, 12, 19))]
    assert made_twice
    assert all(len(digests) == 1 for digests in seen.values()), seen
