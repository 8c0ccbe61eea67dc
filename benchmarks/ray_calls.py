"""Calls per trained rollout, counted where they arrive: every method of every actor, and the creation of each.

Those that go past Ray, over a socket of the machine, count as those that Ray carries.

The run is the one of `millrace train`, on Ray, with the default packs, polls and heartbeats. Calls of a run are some
per pack and some per second, and the details say how many of each. Settings as on the command line, such as
`generation.pack_groups=32`, show what one of them costs.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import asyncio
import json
import pickle
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import torch

from benchmarks import harness
from benchmarks.sorting_run import sorting_run
from examples import tiny_model
from millrace.cluster import config as configs
from millrace.cluster.cli import setting
from millrace.cluster.plan import make_plan
from millrace.cluster.process import Component, Lasting, Process
from millrace.cluster.run import Run
from millrace.cluster.runtime import ray_cluster
from millrace.cluster.spawn import OnRay
from millrace.learner.table_model import TableConfig, TableForCausalLM

# The clock makes them, not the rollouts.
PER_SECOND = ("heartbeat", "status", "reports", "results", "held", "events", "whereabouts")
SIZES: Mapping[int, tuple[float, Mapping[str, Any]]] = {  # rollouts per step -> target, run
    128: (0.2, {"engine": "vllm", "groups_per_step": 16, "steps": 80, "slots": 64}),
    1024: (0.05, {"engine": "table", "groups_per_step": 128, "steps": 20, "slots": 1024}),
}


class Counting(Process):
    """A process of a component that counts the calls which it answers, and their bytes."""

    OWN = Process.OWN | {"received_calls", "received_bytes"}

    def __init__(self, *args: Any) -> None:
        self._calls, self._asked, self._answered = Counter[str](), Counter[str](), Counter[str]()
        super().__init__(*args)

    async def call(self, method: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if method.startswith("received"):
            return await super().call(method, args, kwargs)
        self._calls[method] += 1
        self._asked[method] += pickled_bytes((args, kwargs))
        answer = await super().call(method, args, kwargs)
        self._answered[method] += pickled_bytes(answer)
        return answer

    async def received_calls(self) -> dict[str, int]:
        """Method -> calls."""
        return dict(self._calls)

    async def received_bytes(self) -> dict[str, tuple[int, int]]:
        """Method -> (bytes of arguments, bytes of answers)."""
        return {name: (self._asked[name], self._answered[name]) for name in self._calls}


class CountingLasting(Counting, Lasting):
    """The same of one that is started again."""


def pickled_bytes(value: Any) -> int:
    """What a value is on the wire: pickled, with large buffers beside it.

    >>> pickled_bytes(bytes(1000)) - 1000 < 100
    True
    """
    buffers: list[pickle.PickleBuffer] = []
    whole = ray.cloudpickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    return len(whole) + sum(buffer.raw().nbytes for buffer in buffers)


class CountingOnRay(OnRay):
    """Spawns actors that count."""

    PROCESS, LASTING = Counting, CountingLasting

    def __init__(self) -> None:
        super().__init__()
        self.handles: dict[str, Any] = {}

    def __call__(self, component: Component, *args: Any, name: str, **kwargs: Any) -> Any:
        self.handles[name] = super().__call__(component, *args, name=name, **kwargs)
        return self.handles[name]

    async def calls(self) -> dict[str, dict[str, int]]:
        """Actor -> method -> calls."""
        return {name: await handle.received_calls() for name, handle in self.handles.items()}

    async def bytes(self) -> dict[str, dict[str, tuple[int, int]]]:
        """Actor -> method -> bytes of arguments and of answers."""
        return {name: await handle.received_bytes() for name, handle in self.handles.items()}


def table_model(directory: Path) -> None:
    """A softmax table with the tiny model's tokens, for an engine that costs nothing."""
    tokenizer = tiny_model.tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = TableConfig(vocab_size=len(tokenizer), positions=32, eos_token_id=tokenizer.eos_token_id)
        model = TableForCausalLM(config)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def settled(directory: Path, size: int, settings: Sequence[str]) -> configs.RunConfig:
    """The run of this size, with what the command line says instead."""
    _, its = SIZES[size]
    (table_model if its["engine"] == "table" else tiny_model.build)(directory / "model")
    table = sorting_run(steps=its["steps"], groups_per_step=its["groups_per_step"])
    table["generation"] = {"engine": its["engine"], "slots": its["slots"]}
    table["data"]["held_out_limit"] = 50
    for text in settings:
        keys, value = setting(text)
        inner = table
        for key in keys[:-1]:
            inner = inner.setdefault(key, {})
        inner[keys[-1]] = value
    return configs.of(table, root=directory, source="benchmark", name=f"calls-{size}")


async def _executed(config: configs.RunConfig, spawn: CountingOnRay) -> tuple[Mapping[str, Any], dict[str, Any]]:
    config.directory.mkdir(parents=True)
    run = Run(make_plan(config), spawn=spawn, resume=False, say=lambda line: print(f"  {line}", flush=True))
    return await run.execute(), await spawn.calls()


def measure(config: configs.RunConfig) -> tuple[float, dict[str, object]]:
    """Calls per trained rollout of one run, and the table of all calls."""
    with ray_cluster():
        spawn = CountingOnRay()
        try:
            began = time.monotonic()
            result, by_actor = asyncio.run(_executed(config, spawn))
            lived_s = time.monotonic() - began
        finally:
            spawn.kill()
    trained = result["samples"]
    created = len(by_actor)
    total = sum(sum(calls.values()) for calls in by_actor.values()) + created
    in_queue = sum(by_actor["queue"].values())
    # The queue counts for itself; only what came after the last status may be missing there.
    own = result["calls"]["by_method"]
    assert all(many <= by_actor["queue"][name] for name, many in own.items()), (own, by_actor["queue"])
    timed = sum(many for calls in by_actor.values() for name, many in calls.items() if name in PER_SECOND)
    return total / trained, {
        "trained_rollouts": trained,
        "rollouts_per_s": trained / result["seconds"],
        "seconds": result["seconds"],
        "calls": total,
        "calls_at_the_queue": in_queue,
        "as_result_json_says": result["calls"]["of_the_queue_per_trained_rollout"],
        "per_rollout_not_timed": (total - timed) / trained,
        "timed_calls_per_s": timed / lived_s,
        "by_actor": by_actor,
        "creations": created,
    }


def main() -> None:
    """Count at both sizes."""
    parser = harness.arguments(__doc__)
    parser.add_argument("--size", type=int, choices=sorted(SIZES), help="rollouts per step (default: each)")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="of the run, as generation.linger_s=0.5")
    given = parser.parse_args()
    harness.refuse_a_busy_machine(anyway=given.busy)
    where = harness.machine()
    rows = []
    for size in [given.size] if given.size else SIZES:
        with tempfile.TemporaryDirectory() as directory:
            found, details = measure(settled(Path(directory), size, given.settings))
        details["limit"] = "1 per pack"
        what = f"calls per trained rollout, {size} rollouts per step, {SIZES[size][1]['engine']} engine"
        if given.settings:
            what += ", " + " ".join(given.settings)
        rows.append(harness.row(f"P4/{size}", what, found, target=("<=", SIZES[size][0]), where=where, details=details))
        print(f"  {size}: {found:.4f} {json.dumps(details, indent=1)}")
    if not given.no_record:
        harness.record(rows)


if __name__ == "__main__":
    main()
