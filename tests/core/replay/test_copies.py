"""A copy of a world goes its own way: cheap copies are compared with the ones that Python makes."""

import copy
import pickle
from random import Random

import pytest

from tests.core.replay.explorer import RARE
from tests.core.replay.scenarios import LARGE, SCENES
from tests.core.replay.world import World


def parts(world: World) -> tuple:
    """All that makes two worlds equal, and what the future depends on besides."""
    own, witness = dict(vars(world)), dict(vars(world.witness))
    del own["ledger"], own["witness"]
    del witness["disk"]
    disk = {name: value for name, value in vars(world.disk).items() if name != "replayed"} if world.disk else None
    return own, witness, disk, world.ledger.state, world.key()


@pytest.mark.parametrize("name", [*SCENES, *LARGE])
def test_an_action_does_on_a_copy_what_it_does_on_a_deep_copy_and_leaves_the_world_alone(name: str) -> None:
    """A deep copy has no replay to go on from: what a queue restarts with is compared with a whole replay as well."""
    random, first = Random(name), (SCENES | LARGE)[name]()
    for _ in range(2):
        world = first.copy()
        for _ in range(30):
            actions = world.actions()
            if not actions or world.done():
                break
            before = pickle.dumps(world, -1)
            for action in random.sample(actions, min(6, len(actions))):
                after, twin = world.after(action, last=False), copy.deepcopy(world)
                assert pickle.dumps(world, -1) == before, f"{action} on a copy reaches into the world"
                assert (after is not None) == twin.do(action)
                assert after is None or parts(after) == parts(twin)
            ordinary = [action for action in actions if action[0] not in RARE] or actions
            world = world.after(random.choice(ordinary), last=False) or world
