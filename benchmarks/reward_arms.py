"""A training run of either side on the long-tailed task, and how its held-out reward rose with time and samples.

One rule for both: the weights after every `every`-th step are scored by `expected_reward`, and the clock is that of
training alone. It begins when the first rollout may be sampled, so that what starts before (Ray, engines, models,
imports) is told apart, and TRL's stands still while it evaluates. Ours keeps the published versions it is scored by,
and is scored when it has ended; the time of a step is that of its publication.
"""

import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import long_tail_task
from benchmarks.expected_reward import expected_reward, problems
from benchmarks.harness import ROOT
from benchmarks.runs import Finished, execute
from examples import make_data, tiny_model
from examples.warm_start import settings, train
from millrace.cluster.process import Component, found
from millrace.cluster.runtime import ray_cluster
from millrace.cluster.spawn import OnRay
from millrace.core.protocols import WeightHandle
from millrace.core.weights import from_json, views

TRL_PYTHON = ROOT / ".venv-trl" / "bin" / "python"
RIGHT_STEPS, NOISY_STEPS, WRONG = 400, 200, 0.7  # of the warm start; the share of wrong answers in its second part
SCORED_BY = 2  # threads of torch
ENDS_S = 30.0  # for TRL's process


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What both sides are told."""

    model: str  # directory
    seed: int
    steps: int  # at most
    every: int = 2  # steps between evaluations
    target: float = 0.9
    groups_per_step: int = 16
    group_size: int = 8
    learning_rate: float = 6e-5
    max_tokens: int = long_tail_task.MAX_TOKENS


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """The policy after a step."""

    step: int
    seconds: float  # of training
    samples: int  # trained
    reward: float  # held out


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """A run."""

    start_s: float  # before the clock began
    points: Sequence[Point]
    facts: Mapping[str, Any] = field(default_factory=dict)


def warm_started(folder: Path) -> Path:
    """The model that all runs begin with, made there unless it is there: it knows the task, and mostly fails."""
    model = folder / "model"
    if (model / "config.json").exists():
        return model
    print("warm start: supervised training of a model with random weights, about a minute", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    tiny_model.build(folder / "random")
    parts = (("right", RIGHT_STEPS, 0.0, 3e-3), ("noisy", NOISY_STEPS, WRONG, 3e-4))
    begin = folder / "random"
    for name, steps, wrong, learning_rate in parts:
        rows = folder / f"{name}.jsonl"
        make_data.write(rows, long_tail_task.warm_start(64 * steps, wrong=wrong))
        out = model if name == "noisy" else folder / name
        train(begin, rows, out, settings(steps, learning_rate=learning_rate), name=f"{name} answers")
        begin = out
    return model


class Keeping(OnRay):
    """Spawns a store that keeps every so-many-th version, and a queue that notes when its first draw was leased."""

    def __init__(self, every: int, leased: Path) -> None:
        super().__init__()
        self._every, self._leased = every, leased

    def __call__(self, component: Component, *args: Any, name: str, **kwargs: Any) -> Any:
        if name == "weights":
            kwargs["hold_every"] = self._every
        return super().__call__(
            noting(found(component), self._leased) if name == "queue" else component, *args, name=name, **kwargs
        )


def noting(cls: type, path: Path) -> type:
    """The queue's class, which writes the time of its first lease into a file."""
    noted = path.exists()

    async def lease_draws(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal noted
        grant = await cls.lease_draws(self, *args, **kwargs)  # type: ignore[attr-defined]  # of the class it is
        if grant.leases and not noted:
            path.write_text(str(time.time()))
            noted = True
        return grant

    return type(cls.__name__, (cls,), {"lease_draws": lease_draws})


def ours(setting: Setting, folder: Path, chosen: Mapping[str, Mapping[str, Any]]) -> Curve:
    """`millrace train` with Ray, without held-out evaluation.

    Args:
        folder: for the run and its data.
        chosen: what the run's configuration says besides: section -> key -> value.
    """
    folder.mkdir(parents=True)
    make_data.write(folder / "train.jsonl", long_tail_task.rows()[0])
    leased = folder / "leased"
    began = time.time()
    with ray_cluster():
        finished = execute(our_table(setting, chosen), root=folder, name="run", spawn=Keeping(setting.every, leased))
    ended = time.time()
    first = float(leased.read_text())
    points = _scored(finished, setting, first)
    steps = finished.metrics()
    keys = [key for key in steps[0] if key.startswith(("time/", "idle/"))]
    return Curve(
        start_s=first - began,
        points=points,
        facts={
            "whole_s": ended - began,
            "throughput": finished.result["throughput"],
            "waste": finished.result["waste"],
            "lag_histogram": finished.result["lag_histogram"],
            "learner_s_per_step": {key: sum(row[key] for row in steps[1:]) / len(steps[1:]) for key in keys},
            "tokens_per_step": sum(row["train/tokens"] for row in steps) / len(steps),
        },
    )


def our_table(setting: Setting, chosen: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The run's configuration as in its TOML file."""
    table: dict[str, Any] = {
        "model": setting.model,
        "recipe": "grpo",
        "seed": setting.seed,
        "data": {"train": "train.jsonl"},
        "rewards": {"verifier": f"{ROOT / 'benchmarks' / 'long_tail_task.py'}:score"},
        "loop": {
            "steps": setting.steps,
            "groups_per_step": setting.groups_per_step,
            "group_size": setting.group_size,
        },
        "sampling": {"max_tokens": setting.max_tokens},
        "learner": {"learning_rate": setting.learning_rate, "seed": setting.seed},
    }
    for section, values in chosen.items():
        table[section] = {**table.get(section, {}), **values}
    return table


def _scored(finished: Finished, setting: Setting, began: float) -> list[Point]:
    """The versions that the run's store holds."""
    torch.set_num_threads(SCORED_BY)
    model = AutoModelForCausalLM.from_pretrained(setting.model, dtype=torch.float32).eval()
    asked = problems(AutoTokenizer.from_pretrained(setting.model), long_tail_task.rows()[1])
    parameters = dict(model.named_parameters())
    points = []
    for path in sorted((finished.directory / "weights").glob("version_*.json")):
        manifest = from_json(path.read_text(), source=str(path))
        if manifest.step % setting.every:
            continue
        published = views(WeightHandle(manifest=manifest, path=str(path.with_suffix(".bin"))))
        with torch.no_grad():
            for name, value in published.items():
                parameters[name].copy_(torch.from_numpy(value.copy()))
        samples = manifest.step * setting.groups_per_step * setting.group_size
        seconds = max(0.0, path.stat().st_mtime_ns / 1e9 - began) if manifest.step else 0.0
        points.append(Point(step=manifest.step, seconds=seconds, samples=samples, reward=expected_reward(model, asked)))
    return sorted(points, key=lambda point: point.step)


def trl(
    setting: Setting, chosen: Mapping[str, Any], *, threads: int, say: Callable[[str], None] = lambda line: None
) -> Curve:
    """TRL's GRPOTrainer, in its own environment.

    Args:
        chosen: further settings of GRPOConfig.
        threads: of torch.
    Raises:
        FileNotFoundError: the environment is missing.
        RuntimeError: it failed.
    """
    if not TRL_PYTHON.exists():
        raise FileNotFoundError(f"{TRL_PYTHON} is missing: `make test-trl` makes TRL's environment")
    began = time.time()
    command = [str(TRL_PYTHON), "-m", "benchmarks.trl_arm"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin and process.stdout
    try:
        process.stdin.write(json.dumps({**asdict(setting), "threads": threads, "settings": dict(chosen)}) + "\n")
        process.stdin.close()
        start_s, points = 0.0, []
        for text in process.stdout:
            say(text.rstrip())
            if not text.startswith('{"'):  # TRL's own words
                continue
            line = json.loads(text)
            if "ready" in line:
                start_s = time.time() - began
            else:
                points.append(Point(**line))
        if process.wait(timeout=ENDS_S):
            raise RuntimeError(f"TRL's arm ended with {process.returncode}; what it said is above")
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        process.wait()
    return Curve(start_s=start_s, points=points, facts={"whole_s": time.time() - began})
