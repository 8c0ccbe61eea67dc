"""Kills of whatever component, at whatever time, in runs on real Ray. The seeds are printed."""

import random
import time
from contextlib import suppress
from typing import Any

import pytest

from millrace.core.replay.draws import State
from tests.faults import invariants
from tests.faults.harness import Hit, Scene
from tests.faults.leaks import nothing_left

pytestmark = [pytest.mark.ray, pytest.mark.faults]

KINDS = ["generation-0", "generation-1", "reward-0", "reward-1", "learner", "queue", "weights"]
KILLS = 11
APART_S = 1.5
STEPS = 120


def struck(scene: Scene, component: str) -> Hit:
    """Kill it as soon as it lives."""
    while True:
        with suppress(ProcessLookupError):  # its last loss is not known yet
            return scene.kill(component)
        time.sleep(0.05)


@pytest.mark.parametrize("seed", [11, 12])
def test_kills_of_anything_at_any_time_lose_nothing_and_train_nothing_twice(paced_run: Any, seed: int) -> None:
    """Also while others are down: nobody waits for a recovery before the next kill."""
    rng = random.Random(seed)
    config = paced_run(
        seed=seed,
        loop={"steps": STEPS, "max_lag": rng.choice([0, 2, 4]), "crashes": 100},
        generation={"workers": 2, "slots": 16},
        rewards={"workers": 2},
        learner={"checkpoint_every": 3},
        supervise={"backoff_s": 0.1, "backoff_most_s": 0.5, "restarts": 100},
    )
    hits = []
    with nothing_left(), Scene.start(config) as scene:
        scene.until(step=1)
        for _ in range(KILLS):
            time.sleep(rng.uniform(0, APART_S))
            hits.append(struck(scene, rng.choice(KINDS)))
        for hit in hits:
            scene.back(hit)
        ended = scene.end()
    print(f"seed {seed}, max_lag {config.loop.max_lag}: {[hit.component for hit in hits]}")
    found = invariants.hold(ended, hits=hits)
    assert found.states()[State.COMMITTED] == STEPS * config.loop.groups_per_step
    assert ended.status.incidents >= KILLS
