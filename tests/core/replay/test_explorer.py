"""Every interleaving of small worlds, and many of larger ones, on the production ledger."""

import pytest

from tests.core.replay.explorer import explore, walk
from tests.core.replay.scenarios import CALM, LARGE, SCENES


@pytest.mark.parametrize("name", SCENES)
def test_every_interleaving_keeps_the_invariants_and_can_end(name, explorer_limit):
    explored = explore(SCENES[name], limit=explorer_limit)
    assert not explored.stuck, explored.stuck[0]
    assert explored.finished or not explored.complete


@pytest.mark.parametrize("name", LARGE)
def test_random_walks_keep_the_invariants_and_end(name, explorer_limit):
    made = walk(LARGE[name], walks=max(40, explorer_limit // 40), length=160, calm=CALM.get(name, 0.95))
    for action in ("lease", "put", "late", "crash", "tick", "score", "judge_fail", "train", "commit", "learner_crash"):
        assert made[action], f"no walk ever made the action {action}"
