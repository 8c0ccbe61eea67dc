"""A state that was written as one record and read again is the same state, and goes on in the same way."""

import json
from random import Random

import pytest

from millrace.core.errors import LedgerError
from millrace.core.replay.image import image, restore
from millrace.core.replay.ledger import Ledger
from tests.core.replay.explorer import drain
from tests.core.replay.scenarios import LARGE


def through_an_image(world) -> None:
    """The ledger restarts from nothing but the image of its state."""
    record = json.loads(json.dumps(image(world.ledger.state)))
    rebuilt = Ledger(world.config, clock=world.witness.clock, emit=world.witness.emit)
    rebuilt.replay([record])
    old, new = world.ledger.state, rebuilt.state
    assert new == old
    for name in ("waiting", "generated", "scored", "reusable", "draws", "batches"):
        assert list(getattr(new, name)) == list(getattr(old, name)), f"{name} has another order"
    for name, worker in old.workers.items():
        assert list(new.workers[name].answers) == list(worker.answers)
    world.ledger = rebuilt
    for engine in world.engines:  # every lease has one full grace
        for hand in engine.hands:
            hand.seen_at = hand.granted_at = world.now


@pytest.mark.parametrize("name", LARGE)
def test_any_state_of_a_random_walk_survives_and_the_run_ends(name: str) -> None:
    random = Random(name)
    for _ in range(6):
        world = LARGE[name]()
        for step in range(120):
            # the disk of these worlds knows records alone
            actions = [action for action in world.actions() if action[0] != "queue_crash"]
            if not actions or world.done():
                break
            world.do(random.choice(actions))
            if step % 5 == 0:
                through_an_image(world)
        drain(world)
        through_an_image(world)


def test_the_configuration_is_not_part_of_it() -> None:
    world = next(iter(LARGE.values()))()
    record = image(world.ledger.state)
    assert not {"per_step", "max_lag", "steps", "reuse", "released"} & set(record["state"])


def test_a_field_of_a_newer_version_is_refused_and_one_of_an_older_keeps_its_default() -> None:
    world = next(iter(LARGE.values()))()
    record = image(world.ledger.state)
    del record["state"]["lengths"]
    fresh = Ledger(world.config, clock=world.witness.clock, emit=world.witness.emit).state
    restore(fresh, record)
    assert fresh.lengths == {} and fresh.workers == world.ledger.state.workers
    for place in (record["state"], record["state"]["versions"], record["state"]["commits"][0]):
        place["of_tomorrow"] = 1
        with pytest.raises(LedgerError, match="of_tomorrow"):
            restore(fresh, record)
        del place["of_tomorrow"]


def test_it_shares_nothing_with_the_state() -> None:
    world = next(iter(LARGE.values()))()
    random = Random(1)
    for _ in range(60):
        world.do(random.choice([action for action in world.actions() if action[0] != "queue_crash"]))
    record = image(world.ledger.state)
    before = json.dumps(record)
    drain(world)
    assert json.dumps(record) == before
