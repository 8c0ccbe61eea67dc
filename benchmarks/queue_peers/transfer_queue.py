"""TransferQueue as a peer: its own controller and two storage units on Ray, batches as TensorDicts."""

import functools
import os

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import asyncio
import itertools
import logging
from importlib.metadata import version

import ray
import torch
import transfer_queue as tq
from tensordict import TensorDict

from benchmarks.queue_peers.talk import Arrays, Counted, Order, read, rounds, serve

FIELDS = ["ids", "logprobs", "versions"]
partitions = itertools.count()


def _stacked(batch: list[Arrays]) -> TensorDict:
    """What its clients are given: one tensor [batch, tokens] per field."""
    stacked = {name: torch.stack([torch.from_numpy(each[name]) for each in batch]) for name in FIELDS}
    return TensorDict(stacked, batch_size=len(batch))


def _had(found: TensorDict, order: Order) -> int:
    # Jagged tensors come back, of which a row at a time is slow.
    columns = [found[name].unbind() for name in FIELDS]
    for each in zip(*columns, strict=True):
        arrays = {name: tensor.numpy() for name, tensor in zip(FIELDS, each, strict=True)}
        if order.read:
            read(arrays)
    return len(columns[0])


def by_metadata(order: Order) -> Counted:
    """`put`, `get_meta`, `get_data`, one batch after the other; clearing the partition is in no clock."""
    client, partition = tq.get_client(), f"partition-{next(partitions)}"

    def put(batches: list[list[Arrays]]) -> None:
        for batch in batches:
            client.put(data=_stacked(batch), partition_id=partition)

    def take(many: int) -> int:
        got = 0
        for _ in range(many):
            meta = client.get_meta(FIELDS, batch_size=order.batch, partition_id=partition, task_name="learner")
            got += _had(client.get_data(meta), order)
        return got

    return rounds(order, put, take, lambda: client.clear_partition(partition))


def by_key(order: Order, *, in_flight: bool) -> Counted:
    """`kv_batch_put` and `kv_batch_get`; clearing the keys is in no clock."""
    partition = f"partition-{next(partitions)}"
    numbers = itertools.count()
    waiting: list[list[str]] = []

    async def put_all(batches: list[list[Arrays]], keys: list[list[str]]) -> None:
        calls = [
            tq.async_kv_batch_put(keys=own, partition_id=partition, fields=_stacked(batch))
            for own, batch in zip(keys, batches, strict=True)
        ]
        await asyncio.gather(*calls)

    async def take_all() -> list[TensorDict]:
        return await asyncio.gather(*(tq.async_kv_batch_get(keys=own, partition_id=partition) for own in waiting))

    def put(batches: list[list[Arrays]]) -> None:
        keys = [[f"{next(numbers)}" for _ in batch] for batch in batches]
        waiting.extend(keys)
        if in_flight:
            asyncio.run(put_all(batches, keys))
        else:
            for own, batch in zip(keys, batches, strict=True):
                tq.kv_batch_put(keys=own, partition_id=partition, fields=_stacked(batch))

    def take(many: int) -> int:
        if in_flight:
            return sum(_had(found, order) for found in asyncio.run(take_all()))
        return sum(_had(tq.kv_batch_get(keys=own, partition_id=partition), order) for own in waiting)

    def clear() -> None:
        tq.kv_clear(keys=[key for own in waiting for key in own], partition_id=partition)
        waiting.clear()

    return rounds(order, put, take, clear)


if __name__ == "__main__":
    # Its actors ask for a processor each, and wait for ever where there are fewer.
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    tq.init()
    try:
        serve(
            f"TransferQueue {version('TransferQueue')}",
            {
                "metadata": by_metadata,
                "keys": functools.partial(by_key, in_flight=False),
                "keys, in flight": functools.partial(by_key, in_flight=True),
            },
        )
    finally:
        tq.close()
        ray.shutdown()
