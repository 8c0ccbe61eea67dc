"""Samples per second of a whole run on short answers, over what its raw parts would reach one after the other.

    serial ceiling = 1 / (1 / g + 1 / t)        g: `LLM.generate`, t: a plain padded torch step, samples/s, each alone

The parts (serial_parts.py) know no rewards, no updates of the engine's weights, no queue and no processes. A run's
stages are processes that work at the same time, so that with two cores it can pass the ceiling, which one loop in one
process cannot; with more threads the parts are measured too, and the faster counts. Run and parts may use the same
cores, and take turns. The policy is the demo's after its warm start, and hardly moves: its answers keep their length.
With --trl TRL's GRPOTrainer takes its turn as well, in its own environment.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import json
import multiprocessing
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness
from benchmarks.generation_work import Setting
from benchmarks.runs import Finished, execute
from benchmarks.serial_order import Order, Part
from examples import demo
from millrace.cluster.runtime import ray_cluster

DATA = harness.ROOT / "examples" / "sorting" / "train.jsonl"
TRL = harness.ROOT / ".venv-trl" / "bin" / "python"
GROUPS, SIZE, MAX_TOKENS, SLOTS = 16, 8, 16, 128  # a step's 128 responses are generated at once
SKIPPED = 10  # steps of a run, which wait for engines and caches
PART_STEPS, TRL_STEPS = 6, 25
DEADLINE_S = 170.0
THREADS = (1, 2)  # of a part
TARGET = 0.9


def ceiling(generated: Sequence[float], trained: Sequence[float]) -> list[float]:
    """Samples/s of one after the other, round by round.

    >>> ceiling([200.0], [50.0])
    [40.0]
    """
    return [1 / (1 / g + 1 / t) for g, t in zip(generated, trained, strict=True)]


def faster(found: Mapping[str, Sequence[float]], part: str) -> str:
    """The name of the arm with the highest median among those of the part.

    >>> faster({"train/1": [3.0], "train/2": [4.0], "generate/1": [9.0]}, "train")
    'train/2'
    """
    named = (name for name in found if name.split("/")[0].removesuffix(" at once") == part)
    return max(named, key=lambda name: float(np.median(found[name])))


def table(engine: str, model: Path, *, steps: int) -> dict[str, Any]:
    """The run: the demo's, whose policy stays as it is, without held-out evaluation."""
    return {
        "model": str(model),
        "recipe": "grpo",
        "data": {"train": str(DATA)},
        "rewards": {"verifier": "exact"},
        "loop": {"steps": steps, "groups_per_step": GROUPS, "group_size": SIZE, "max_lag": 2},
        "sampling": {"max_tokens": MAX_TOKENS},
        "generation": {"engine": engine, "slots": SLOTS},
        "learner": {"learning_rate": 1e-6, "threads": 1},
    }


@contextmanager
def raw_parts(setting: Setting) -> Iterator[Connection]:
    """The process that holds them; it ends with the block."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve_parts, args=(theirs, setting), daemon=True)
    process.start()
    theirs.close()
    try:
        print(f"  {answer(ours)}")
        yield ours
    finally:
        with suppress(BrokenPipeError):  # it has failed
            ours.send(None)
        process.join(timeout=10)
        if process.is_alive():
            process.kill()


def serve_parts(connection: Connection, setting: Setting) -> None:
    """The process's body; vLLM is imported there alone."""
    import_module("benchmarks.serial_parts").serve(connection, setting)


def answer(connection: Connection) -> Any:
    if not connection.poll(DEADLINE_S):
        raise TimeoutError(f"the raw parts did not answer within {DEADLINE_S:g} s")
    return connection.recv()


@dataclass(slots=True)
class Arms:
    """What takes turns, and what else it says."""

    root: Path
    model: Path
    steps: int
    parts: Connection
    runs: int = 0
    seen: dict[str, Any] = field(default_factory=dict)

    def whole(self, engine: str) -> float:
        """A run on Ray, samples/s."""
        self.runs += 1
        done = execute(table(engine, self.model, steps=self.steps), root=self.root, name=f"{engine}-{self.runs}")
        self.seen[engine] = facts(done)
        return done.steps_per_s(SKIPPED) * GROUPS * SIZE

    def part(self, part: Part, threads: int, at_once: bool = False) -> float:
        """A raw part alone, samples/s."""
        self.parts.send(
            Order(
                part=part,
                threads=threads,
                steps=PART_STEPS,
                groups=GROUPS,
                group_size=SIZE,
                max_tokens=MAX_TOKENS,
                at_once=at_once,
            )
        )
        rate = answer(self.parts)
        self.seen["parts"] = {"tokens_per_sample": rate.tokens_per_sample}
        return float(rate.samples_per_s)

    def trl(self) -> float:
        """TRL's trainer, samples/s."""
        orders = {
            "model": str(self.model),
            "seed": 0,
            "steps": TRL_STEPS,
            "every": 1,
            "target": 1.0,
            "groups_per_step": GROUPS,
            "group_size": SIZE,
            "learning_rate": 1e-6,
            "max_tokens": MAX_TOKENS,
            "threads": 2,
            "settings": {},
        }
        command = [str(TRL), "-m", "benchmarks.trl_sorting"]
        environment = {**os.environ, "OMP_NUM_THREADS": "2"}
        done = subprocess.run(
            command, input=json.dumps(orders) + "\n", capture_output=True, text=True, cwd=harness.ROOT, env=environment
        )
        if done.returncode:
            sys.exit(f"TRL's arm ended with {done.returncode}:\n{done.stderr[-2000:]}")
        return float(json.loads(done.stdout.splitlines()[-1])["samples_per_s"])


def facts(done: Finished) -> dict[str, Any]:
    """What explains a run's rate."""
    rows = done.metrics()[SKIPPED:]
    return {
        "tokens_per_sample": float(np.mean([row["rollout/mean_length"] for row in rows])),
        "skipped_groups_share": float(np.mean([row["train/skipped_groups"] for row in rows])) / GROUPS,
        "learner_idle": done.result["idle"]["learner"],
        "lag_histogram": done.result["lag_histogram"],
        "rewards": [done.result["reward"]["first"], done.result["reward"]["last"]],
    }


def main() -> None:
    """Measure the engines that are named."""
    parser = harness.arguments(__doc__)
    parser.set_defaults(pairs=5)
    parser.add_argument("--engines", default="vllm,transformers", help="of the whole runs")
    parser.add_argument("--steps", type=int, default=60, help="of a run (default 60)")
    parser.add_argument("--trl", action="store_true", help="TRL's GRPOTrainer takes its turn, too")
    given = parser.parse_args()
    harness.refuse_a_busy_machine(anyway=given.busy)
    if given.trl and not TRL.exists():
        sys.exit(f"{TRL} is missing: `make test-trl` makes it")
    model = harness.ROOT / "runs" / "demo" / "model"
    if not model.exists():
        demo.warm_start(model.parent)
    where, engines = harness.machine(), given.engines.split(",")
    cores = tuple(sorted(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as directory, ray_cluster():
        setting = Setting(
            model=str(model), data=str(DATA), directory=directory, slots=SLOTS, max_model_len=64, cores=cores
        )
        with raw_parts(setting) as parts:
            arms = Arms(Path(directory), model, given.steps, parts)
            found = harness.interleave(turns(arms, engines, trl=given.trl), pairs=given.pairs, warm=0)
    made = rows(found, arms.seen, engines, where=where, cores=len(cores), steps=given.steps)
    if given.no_record:
        print(*(f"{row.id} {row.value:.3f} {row.interval} {row.details}" for row in made), sep="\n")
    else:
        harness.record(made)


def turns(arms: Arms, engines: Sequence[str], *, trl: bool) -> dict[str, Callable[[], float]]:
    """The arms, by name."""
    named: dict[str, Callable[[], float]] = {engine: partial(arms.whole, engine) for engine in engines}
    for threads in THREADS:
        named[f"generate/{threads}"] = partial(arms.part, "generate", threads)
        named[f"generate at once/{threads}"] = partial(arms.part, "generate", threads, at_once=True)
        named[f"generate with transformers/{threads}"] = partial(arms.part, "generate with transformers", threads)
        named[f"train/{threads}"] = partial(arms.part, "train", threads)
    return {**named, "trl": arms.trl} if trl else named


def rows(
    found: Mapping[str, Sequence[float]],
    seen: Mapping[str, Any],
    engines: Sequence[str],
    *,
    where: str,
    cores: int,
    steps: int,
) -> list[harness.Row]:
    """What is recorded: a row per engine against the ceiling, and one against TRL if it ran."""
    best = {part: faster(found, part) for part in ("generate", "generate with transformers", "train")}
    limit = ceiling(found[best["generate"]], found[best["train"]])
    median = {name: round(float(np.median(values)), 1) for name, values in found.items()}
    details: dict[str, object] = {
        "samples_per_s": median,
        "parts": {**best, **seen["parts"]},
        "serial_ceiling": round(float(np.median(limit)), 1),
        "two_core_limit": round(min(median[best["generate"]], median[best["train"]]), 1),
        "cores": f"{cores}, for the run and for either part; each process of the run computes with one thread",
        "steps": steps,
        "raw": {name: [round(value, 1) for value in values] for name, values in found.items()},
    }
    made = []
    for engine in engines:
        ratio = harness.ratio(found[engine], limit)
        what = f"samples/s of a run on Ray with {engine}, short answers / serial ceiling of raw vLLM and raw torch"
        learnt = 1 - seen[engine]["skipped_groups_share"]
        sooner = ceiling(found[best["generate"]], [rate / learnt for rate in found[best["train"]]])
        same_skipped = str(harness.ratio(found[engine], sooner))
        own = ceiling(found[best["generate with transformers"]], found[best["train"]])
        its = {**details, "run": seen[engine], "if_the_raw_step_skipped_as_many_groups": same_skipped}
        made.append(harness.row(f"P12s/{engine}", what, ratio, target=(">=", TARGET), where=where, details=its))
        what = f"samples/s of a run on Ray with {engine}, short answers / serial ceiling of transformers' generate"
        ratio = harness.ratio(found[engine], own)
        id = f"P12s/{engine}-raw-transformers"
        made.append(harness.row(id, what, ratio, target=None, where=where, details=its))
        if "trl" in found:
            what = f"samples/s of a run on Ray with {engine}, short answers / TRL's GRPOTrainer"
            ratio = harness.ratio(found[engine], found["trl"])
            made.append(harness.row(f"P12s/{engine}-trl", what, ratio, target=None, where=where, details=its))
    return made


if __name__ == "__main__":
    main()
