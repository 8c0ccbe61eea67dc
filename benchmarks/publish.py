"""P5: publish -> last engine serving, over pause + reload + resume with the weights local; and the pause of fetching.

Both arms end when the last engine has sampled its first token with the new version, while all of them generate.

    publish   from the call of publish with finished weights: pack, digest, write, notify, verify, wait for the
              step under way, load, first step
    local     all engines at one moment: wait for the step under way, pause, reload, resume, first step

The store, the publisher, the receiving end and the engines are the real ones, each a Ray actor.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import asyncio
import itertools
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import harness
from benchmarks.publish_actors import VOCABULARY, PublishingLearner, Serving
from millrace.cluster.runtime import ray_cluster
from millrace.cluster.spawn import OnRay
from millrace.core.weight_store import FileWeightStore, NodeStore

SHAPES = {  # name -> hidden size, of the MLP, layers, heads
    "1M": (128, 384, 4, 4),
    "10M": (384, 1024, 6, 6),
    "100M": (768, 2048, 14, 12),
    "300M": (1024, 2816, 24, 16),
}
SLOTS, MAX_TOKENS = 4, 32
SETTLE_S = 0.3  # of undisturbed generation between two publishes
COPIES = 3.5  # of the weights in an engine: loaded, packed for the kernels, and while it starts
Step = tuple[float, float, int]  # began, ended, version


def model_of(size: str) -> LlamaForCausalLM:
    """Randomly initialised."""
    hidden, inner, layers, heads = SHAPES[size]
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=256,
            tie_word_embeddings=False,
        )
    )


def pieces(learner: Mapping[str, float], engine: Mapping[str, float]) -> dict[str, float]:
    """Where the time of one publish went, as seen from one engine, seconds; they add up to the whole.

    Args:
        learner: `began`, `written`.
        engine: `heard`, `swap_began`, `swap_ended`, `serves`.

    >>> learner = {"began": 0, "written": 3}
    >>> list(pieces(learner, {"heard": 4, "swap_began": 6, "swap_ended": 9, "serves": 10}).values())
    [3, 1, 2, 3, 1]
    """
    moments = [*(learner[name] for name in LEARNER_MOMENTS), *(engine[name] for name in ENGINE_MOMENTS)]
    spent = [after - before for before, after in itertools.pairwise(moments)]
    return dict(zip(PIECES, spent, strict=True))


LEARNER_MOMENTS = ("began", "written")
ENGINE_MOMENTS = ("heard", "swap_began", "swap_ended", "serves")
PIECES = (
    "pack_digest_and_write",
    "hand_over_and_notify",
    "verify_and_wait_for_step",
    "pause_and_load",
    "first_step",
)


def fetch_pause_s(steps: Sequence[Step], windows: Sequence[tuple[float, float]]) -> list[float]:
    """How much longer an engine stood still between two steps while weights were fetched than just before.

    Args:
        steps: of its thread, in order.
        windows: for each publish, from its call to the beginning of the swap; each is compared with the equally long
            time before it, in which nothing was published.

    >>> steps = [(0, 1, 0), (1.1, 2, 0), (2.1, 3, 0), (3.6, 4, 0), (4.1, 5, 0)]
    >>> [round(more, 2) for more in fetch_pause_s(steps, [(2.5, 4.5)])]
    [0.5]
    """
    gaps = [(ended, began) for (_, ended, _), (began, _, _) in itertools.pairwise(steps)]

    def longest(since: float, until: float) -> float:
        return max((min(began, until) - max(ended, since) for ended, began in gaps), default=0.0)

    return [longest(since, until) - max(0.0, longest(2 * since - until, since)) for since, until in windows]


class Site:
    """A store, a learner and engines at work."""

    def __init__(self, spawn: OnRay, directory: Path, *, engines: int, dtype: str) -> None:
        self._store = spawn(FileWeightStore, str(directory / "weights"), name="weights", home=True, lasting=True)
        near, model = NodeStore(self._store), str(directory / "model")
        self.learner = spawn(PublishingLearner, model, near, dtype=dtype, name="learner")
        self.engines = [
            spawn(Serving, model, near, dtype=dtype, slots=SLOTS, max_tokens=MAX_TOKENS, name=f"engine-{number}")
            for number in range(engines)
        ]
        self._versions = itertools.count()
        self._directory = directory / "local"
        self.published: list[tuple[int, dict[str, float], list[float]]] = []

    async def begin(self) -> None:
        """The first version, with its probes, and a local copy for the other arm."""
        await asyncio.gather(*(engine.start() for engine in self.engines))
        await self.publish()
        self._local = await self.learner.local(str(self._directory), 0)
        self.published.clear()

    async def publish(self) -> float:
        """Seconds until the last engine serves."""
        await asyncio.sleep(SETTLE_S)
        version = next(self._versions)
        learner = await self.learner.publish(version)
        serves = await asyncio.gather(*(engine.serves(version) for engine in self.engines))
        self.published.append((version, learner, serves))
        return float(max(serves) - learner["began"])

    async def reload(self) -> float:
        """Seconds until the last engine serves what it has."""
        await asyncio.sleep(SETTLE_S)
        version, at = next(self._versions), time.monotonic() + 0.1
        serves = await asyncio.gather(*(engine.reload(self._local, version, at) for engine in self.engines))
        return float(max(serves) - at)

    async def account(self) -> dict[str, Any]:
        """Where the time of the published versions went, and how long fetching stopped an engine."""
        lines = [await engine.timeline() for engine in self.engines]
        shares, last, pauses, swaps_s = [], [], [], []
        for version, learner, serves in self.published:
            of_engines = [
                pieces(learner, _moments(line, version, served)) for line, served in zip(lines, serves, strict=True)
            ]
            shares.extend(of_engines)
            last.append(of_engines[serves.index(max(serves))])
        for line in lines:
            windows = [(learner["began"], line["swaps"][version][0]) for version, learner, _ in self.published]
            pauses.append(median(fetch_pause_s(line["steps"], windows)))
            swaps_s.extend(ended - began for began, ended in line["swaps"].values())
        limits = await self.learner.limits()
        return {
            "pieces_s_of_the_last_engine": {name: median(each[name] for each in last) for name in PIECES},
            "pieces_s_of_all_engines": {name: median(each[name] for each in shares) for name in PIECES},
            "fetch_pause_s": pauses,
            "swap_pause_s": median(swaps_s),
            "step_s": median(ended - began for line in lines for began, ended, _ in line["steps"]),
            "limits": limits,
        }


def _moments(line: Mapping[str, Any], version: int, served: float) -> dict[str, float]:
    began, ended = line["swaps"][version]
    return {"heard": line["heard"][version], "swap_began": began, "swap_ended": ended, "serves": served}


def measure(size: str, engines: int, dtype: str, *, pairs: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of both arms, and the account."""
    with tempfile.TemporaryDirectory() as name, ray_cluster():
        directory = Path(name)
        model = model_of(size)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        model.save_pretrained(directory / "model")
        del model
        spawn = OnRay()
        with asyncio.Runner() as runner:
            try:
                site = Site(spawn, directory, engines=engines, dtype=dtype)
                runner.run(site.begin())
                arms = {"publish": lambda: runner.run(site.publish()), "local": lambda: runner.run(site.reload())}
                found = harness.interleave(arms, pairs=pairs, warm=2)
                account = runner.run(site.account())
            finally:
                spawn.kill()
    return found, {"parameters": parameters, "dtype": dtype, **account}


def fits(size: str, engines: int) -> str:
    """The dtype in which so many engines fit into the memory that is free."""
    hidden, inner, layers, _ = SHAPES[size]
    parameters = layers * (4 * hidden**2 + 3 * hidden * inner)
    needed = parameters * 4 * (COPIES * engines + 7)  # the learner's, its buffer, the store's files
    return "float32" if needed < 0.8 * psutil.virtual_memory().available else "bfloat16"


def rows_of(size: str, engines: int, dtype: str, *, pairs: int, where: str) -> list[harness.Row]:
    """Both figures of one size and number of engines."""
    found, account = measure(size, engines, dtype, pairs=pairs)
    limits, seconds = account["limits"], median(found["publish"])
    account["seconds"] = found
    account["limit"] = "1: loading is in both arms; else one copy in memory"
    account["bytes_per_s_over_memcpy"] = limits["memcpy_s"] / (seconds - median(found["local"]) or 1e-9)
    its = f"{size} parameters, {engines} engine(s), {dtype}"
    pause = max(0.0, round(max(account["fetch_pause_s"]), 3))
    what = "publish -> last engine serving / pause + reload + resume with the weights local"
    return [
        harness.row(
            f"P5/{size}-{engines}",
            f"{what}, {its}",
            harness.ratio(found["publish"], found["local"]),
            target=("<=", 1.3),
            where=where,
            details=account,
        ),
        harness.row(
            f"P5/{size}-{engines}-pause",
            f"seconds that fetching stopped an engine, {its}",
            pause,
            target=("<=", 0.0),
            where=where,
            details={"fetch_pause_s": account["fetch_pause_s"], "swap_pause_s": account["swap_pause_s"]},
        ),
    ]


def main() -> None:
    """Every size with every number of engines, or those that are asked for."""
    parser = harness.arguments(__doc__)
    parser.add_argument("--size", choices=list(SHAPES), action="append", help="of the model (default: each)")
    parser.add_argument("--engines", type=int, action="append", help="default: 1 and 4")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: float32 where it fits")
    given = parser.parse_args()
    harness.refuse_a_busy_machine(anyway=given.busy)
    where = harness.machine()
    for size in given.size or SHAPES:
        for engines in given.engines or (1, 4):
            dtype = given.dtype or fits(size, engines)
            print(f"{size}, {engines} engine(s), {dtype}", flush=True)
            rows = rows_of(size, engines, dtype, pairs=given.pairs, where=where)
            if given.no_record:
                for row in rows:
                    print(f"{row.id}: {row.value:.3f} {row.interval} {row.details}")
            else:
                harness.record(rows)


if __name__ == "__main__":
    main()
