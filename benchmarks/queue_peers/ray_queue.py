"""`ray.util.queue.Queue` as a peer: an item is a rollout, unless the setting says that it is a whole batch."""

import functools
import os
from collections.abc import Callable

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import logging
from typing import Any

import numpy as np
import ray
from ray.util.queue import Queue

from benchmarks.queue_peers.talk import Arrays, Counted, Order, read, rounds, serve


def measured(order: Order, *, in_flight: bool) -> Counted:
    """`put_nowait_batch` and `get_nowait_batch`, one after the other or all of a round in flight."""
    queue = Queue(actor_options={"num_cpus": 0, "max_concurrency": 1000})

    def put(batches: list[list[Arrays]]) -> None:
        if in_flight:
            ray.get([queue.actor.put_nowait_batch.remote(batch) for batch in batches])
        else:
            for batch in batches:
                queue.put_nowait_batch(batch)

    def take(many: int) -> int:
        if in_flight:
            got = ray.get([queue.actor.get_nowait_batch.remote(order.batch) for _ in range(many)])
        else:
            got = [queue.get_nowait_batch(order.batch) for _ in range(many)]
        return sum(_had(batch, order) for batch in got)

    return _until_it_ends(queue, lambda: rounds(order, put, take))


def stacked(order: Order) -> Counted:
    """One item is a whole batch, as arrays [batch, tokens]: nothing smaller can be put or taken any more."""
    queue = Queue(actor_options={"num_cpus": 0, "max_concurrency": 1000})

    def put(batches: list[list[Arrays]]) -> None:
        items = ({name: np.stack([each[name] for each in batch]) for name in batch[0]} for batch in batches)
        ray.get([queue.actor.put_nowait.remote(item) for item in items])

    def take(many: int) -> int:
        got = ray.get([queue.actor.get_nowait.remote() for _ in range(many)])
        return sum(
            _had([{name: array[i] for name, array in item.items()} for i in range(order.batch)], order) for item in got
        )

    return _until_it_ends(queue, lambda: rounds(order, put, take))


def _had(batch: list[Arrays], order: Order) -> int:
    if order.read:
        for each in batch:
            read(each)
    return len(batch)


def _until_it_ends(queue: Any, measure: Callable[[], Counted]) -> Counted:
    try:
        return measure()
    finally:
        queue.shutdown(force=True)


if __name__ == "__main__":
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        serve(
            f"Ray {ray.__version__}",
            {
                "one by one": functools.partial(measured, in_flight=False),
                "in flight": functools.partial(measured, in_flight=True),
                "stacked": stacked,
            },
        )
    finally:
        ray.shutdown()
