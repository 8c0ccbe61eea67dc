"""Reverb as a peer: a queue table in a server of its own process, one item per rollout, one trajectory writer."""

import functools
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import itertools
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib.metadata import version

import reverb
import tensorflow as tf

from benchmarks.queue_peers.talk import Arrays, Counted, Order, read, rounds, serve

ORDERS = 256  # each has a table of its own: a sampler that ends may have asked for items ahead


class Servers:
    """A server for each length of rollouts, in a process of its own."""

    def __init__(self) -> None:
        self._running: dict[int, tuple[str, itertools.count[int]]] = {}
        self._processes: list[subprocess.Popen[str]] = []

    def table(self, tokens: int) -> tuple[str, str]:
        """Address and name of a table that nobody has used."""
        if tokens not in self._running:
            command = [sys.executable, "-m", "benchmarks.queue_peers.reverb_server", "server", str(tokens)]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            self._processes.append(process)
            self._running[tokens] = (f"localhost:{process.stdout.readline().strip()}", itertools.count())
        address, numbers = self._running[tokens]
        return address, f"rollouts-{next(numbers)}"

    def close(self) -> None:
        for process in self._processes:
            process.stdin.close()
            process.wait()


def serve_tables(tokens: int) -> None:
    """Until the input is closed."""
    signature = {name: tf.TensorSpec([1, tokens], kind) for name, kind in COLUMNS.items()}
    tables = [reverb.Table.queue(f"rollouts-{i}", max_size=1_000_000, signature=signature) for i in range(ORDERS)]
    running = reverb.Server(tables, port=None)
    print(running.port, flush=True)
    sys.stdin.read()
    running.stop()


COLUMNS = {"ids": tf.int32, "logprobs": tf.float32, "versions": tf.int32}


def measured(order: Order, *, dataset: bool, flush_each: bool, both: bool) -> Counted:
    """
    Args:
        dataset: sample through TrajectoryDataset instead of the client's sampler.
        flush_each: wait until the server has each batch, instead of having the next on its way.
        both: put and take at the same time, from two threads; the time is booked as put.
    """
    address, table = SERVERS.table(order.tokens)
    client = reverb.Client(address)
    samples = iter(_dataset(address, table, order)) if dataset else None
    taken: list[int] = []

    def put(batches: list[list[Arrays]]) -> None:
        taking = threading.Thread(target=take_now, args=(len(batches),)) if both else None
        if taking:
            taking.start()
        for batch in batches:
            for each in batch:
                writer.append(each)
                writer.create_item(table, 1.0, {name: writer.history[name][-1:] for name in each})
            writer.flush(0 if flush_each else order.batch)
        writer.flush()
        if taking:
            taking.join()

    def take_now(many: int) -> None:
        wanted = many * order.batch
        taken.append(0)
        for data in _from_dataset(samples, wanted) if samples else _from_sampler(client, table, wanted):
            if order.read:
                read(data)
            taken[-1] += 1

    def take(many: int) -> int:
        if not both:
            take_now(many)
        return taken.pop()

    with client.trajectory_writer(num_keep_alive_refs=1) as writer:
        return rounds(order, put, take)


def _from_sampler(client: reverb.Client, table: str, wanted: int) -> Iterator[Arrays]:
    for sample in client.sample(table, wanted, emit_timesteps=False):
        yield dict(zip(COLUMNS, sample.data, strict=True))


def _from_dataset(samples: Iterator[reverb.ReplaySample], wanted: int) -> Iterator[Arrays]:
    for sample in itertools.islice(samples, wanted):
        yield {name: column.numpy() for name, column in sample.data.items()}


def _dataset(address: str, table: str, order: Order) -> tf.data.Dataset:
    return reverb.TrajectoryDataset.from_table_signature(
        server_address=address,
        table=table,
        max_in_flight_samples_per_worker=max(1, min(order.batch, 64)),
        num_workers_per_iterator=1,
    )


SERVERS = Servers()

if __name__ == "__main__":
    if sys.argv[1:2] == ["server"]:
        serve_tables(int(sys.argv[2]))
    else:
        settings = {
            "sampler": {"dataset": False, "flush_each": False, "both": False},
            "sampler, flushed per batch": {"dataset": False, "flush_each": True, "both": False},
            "dataset": {"dataset": True, "flush_each": False, "both": False},
            "dataset, put and take at once": {"dataset": True, "flush_each": False, "both": True},
        }
        try:
            serve(
                f"Reverb {version('dm-reverb')}",
                {name: functools.partial(measured, **setting) for name, setting in settings.items()},
            )
        finally:
            SERVERS.close()
