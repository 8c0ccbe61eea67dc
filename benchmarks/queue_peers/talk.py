"""How a peer's script talks to `benchmarks.queue_rates`: one line of JSON in, one out. Needs numpy alone.

It says which settings it has, then answers orders: rollouts through its queue, and the seconds that took.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import numpy as np

POOL = 256  # rollouts with arrays of their own


@dataclass(frozen=True, slots=True)
class Order:
    """What to measure."""

    setting: str
    tokens: int  # of a rollout
    batch: int  # rollouts of a put, and of a take
    alive: int  # batches that are put before the first is taken
    seconds: float  # to spend on it, about
    read: bool  # the consumer reads every array, not just has it


@dataclass(slots=True)
class Counted:
    """What it came to."""

    rollouts: int = 0
    put_s: float = 0.0
    take_s: float = 0.0


Arrays = dict[str, np.ndarray]


def rollouts(tokens: int, many: int) -> list[Arrays]:
    """Ids, log-probabilities and versions, 4 bytes each per token."""
    rng = np.random.default_rng(0)
    return [
        {
            "ids": rng.integers(0, 150_000, tokens, dtype=np.int32),
            "logprobs": -rng.random(tokens, dtype=np.float32),
            "versions": np.full(tokens, 3, np.int32),
        }
        for _ in range(many)
    ]


def read(arrays: Mapping[str, np.ndarray]) -> None:
    """Touch all of it."""
    for array in arrays.values():
        array.sum()


def rounds(
    order: Order,
    put: Callable[[list[list[Arrays]]], None],
    take: Callable[[int], int],
    after: Callable[[], None] = lambda: None,
) -> Counted:
    """Put `alive` batches and take them, again and again, the first time unmeasured.

    Args:
        put: these batches; returns when the queue has them.
        take: so many batches; returns the rollouts it got.
        after: what follows a round in no clock.
    """
    pool = rollouts(order.tokens, min(POOL, order.batch * order.alive))
    many = order.batch * order.alive
    batches = [[pool[(first + at) % len(pool)] for at in range(order.batch)] for first in range(0, many, order.batch)]
    found = Counted()
    began = -1.0
    while began < 0 or not found.rollouts or time.perf_counter() - began < order.seconds:
        start = time.perf_counter()
        put(batches)
        middle = time.perf_counter()
        got = take(order.alive)
        end = time.perf_counter()
        assert got == many, f"{got} of {many} rollouts came back"
        after()
        if began < 0:
            began = time.perf_counter()
            continue
        found.rollouts += got
        found.put_s += middle - start
        found.take_s += end - middle
    return found


def serve(version: str, arms: Mapping[str, Callable[[Order], Counted]]) -> None:
    """Answer orders until there are none. What libraries print goes to the errors.

    Args:
        arms: setting -> who measures with it.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps({"version": version, "settings": list(arms)}), file=answers, flush=True)
    for line in sys.stdin:
        order = Order(**json.loads(line))
        print(json.dumps(asdict(arms[order.setting](order))), file=answers, flush=True)
