"""Breadth-first search over every interleaving of a small world, on the production ledger."""

from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import inf
from random import Random

from tests.core.replay.world import World

FAULTS = {"crash", "judge_crash", "learner_crash", "late", "judge_fail", "filter", "leave", "revert", "lose"}
FAULTS |= {"fence", "judge_fence", "fail", "queue_crash"}
RARE = {"fence", "judge_fence", "fail", "queue_crash"}  # possible nearly always: walks would be of nothing else


@dataclass
class Explored:
    states: int  # expanded
    visited: int  # seen and checked, expanded or not
    transitions: int
    complete: bool  # every reachable state was expanded
    finished: int  # states in which the run is over
    stuck: list[tuple]  # traces to states from which the run cannot end


def explore(make: Callable[[], World], *, limit: int, visits: float = inf) -> Explored:
    """Expand up to `limit` states, or until `visits` were seen. Every invariant is checked after every action.

    Raises:
        AssertionError: an invariant was broken; the message ends with the trace.
    """
    first = make()
    numbers = {hash(first.key()): 0}  # 64 bits: a collision would hide one state in 10^8 runs of 10^5
    frontier = deque([(0, first)])
    parents: list[tuple[int, tuple]] = [(-1, ())]
    before: list[list[int]] = [[]]  # fault-free predecessors
    finished, transitions, expanded = [], 0, 0
    open_ends: set[int] = set()
    while frontier:
        number, origin = frontier.popleft()
        if expanded >= limit or len(parents) >= visits:
            open_ends.add(number)
            continue
        expanded += 1
        if origin.done():
            finished.append(number)
        actions = origin.actions()
        for i, action in enumerate(actions):
            try:
                world = origin.after(action, last=i == len(actions) - 1)
            except Exception as caught:
                raise AssertionError(
                    f"{type(caught).__name__}: {caught}\n{trace(parents, number)} then {action}"
                ) from caught
            if world is None:
                continue
            transitions += 1
            target = numbers.setdefault(hash(world.key()), len(numbers))
            if target == len(parents):
                parents.append((number, action))
                before.append([])
                frontier.append((target, world))
            if action[0] not in FAULTS:
                before[target].append(number)
    stuck = _cannot_end(before, {*finished, *open_ends})
    return Explored(
        expanded, len(parents), transitions, not open_ends, len(finished), [trace(parents, n) for n in stuck[:3]]
    )


def walk(make: Callable[[], World], *, walks: int, length: int, seed: int = 0, calm: float = 0.95) -> Counter[str]:
    """Random walks, each ended without further faults. Returns how often each action was made.

    Args:
        calm: share of steps in which nothing rare happens.
    Raises:
        AssertionError: an invariant was broken, or a run could not end; the message ends with the trace.
    """
    random, made = Random(seed), Counter[str]()
    for _ in range(walks):
        world, steps = make(), []
        try:
            for _ in range(length):
                actions = world.actions()
                if not actions or world.done():
                    break
                ordinary = [action for action in actions if action[0] not in RARE]
                if ordinary and random.random() < calm:
                    actions = ordinary
                steps.append(random.choice(actions))
                made[steps[-1][0]] += 1
                world.do(steps[-1])
            drain(world)
        except Exception as caught:
            raise AssertionError(f"{type(caught).__name__}: {caught}\nafter {steps}") from caught
    return made


def drain(world: World) -> None:
    """From here on nothing fails: the run must end."""
    for _ in range(400):
        if world.done():
            return
        world.budget.tick = 1
        actions = world.actions()
        if not any(world.do(action) for action in _orderly(actions)):
            raise AssertionError(f"nothing can happen any more, of {actions}")
    raise AssertionError(f"the run does not end: {world.ledger.why_no_batch(world.ledger.state.step)}")


def _orderly(actions: list[tuple]) -> Iterator[tuple]:
    """What the components would do by themselves, one action after the other until one has an effect."""
    for name in ("announce", "load", "score", "judge", "put", "take", "train", "lease", "commit", "tick"):
        yield from (action for action in actions if action[0] == name)


def _cannot_end(before: list[list[int]], ends: set[int]) -> list[int]:
    """States from which no fault-free way leads to an end, or to a state that was not expanded."""
    reached, todo = set(ends), list(ends)
    while todo:
        for source in before[todo.pop()]:
            if source not in reached:
                reached.add(source)
                todo.append(source)
    return [number for number in range(len(before)) if number not in reached]


def trace(parents: list[tuple[int, tuple]], number: int) -> tuple:
    """The actions that lead to a state."""
    actions = []
    while number > 0:
        number, action = parents[number]
        actions.append(action)
    return tuple(reversed(actions))
