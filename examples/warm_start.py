"""Supervised training of a tiny model before reinforcement learning, so that it knows the form of an answer."""

import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples import make_data, tiny_model
from millrace.actors.datasets.config import DataConfig
from millrace.actors.datasets.loading import load
from millrace.learner.config import Schedule, SupervisedConfig
from millrace.learner.report import StepNumbers
from millrace.learner.supervised import train_supervised
from millrace.learner.tokenizer import load_tokenizer

RUNS = Path(__file__).resolve().parent.parent / "runs" / "examples"
SAID_EVERY = 100  # steps


def train(model: Path, rows: Path, out: Path, settings: SupervisedConfig, *, name: str) -> float:
    """Train a tiny model on the answers of a file, and write it to `out`. Returns the seconds that it took.

    Args:
        model: directory of the model as it begins.
        rows: a .jsonl file with prompt and answer.
        name: of what it learns, in the lines of progress.
    """
    tokenizer = load_tokenizer(str(model))
    data = DataConfig(train=str(rows))
    prompts = load(rows, tokenizer, data, context_tokens=tiny_model.CONTEXT_TOKENS, max_new_tokens=1)
    steps = settings.epochs * -(-len(prompts) // settings.batch_rows)
    return train_supervised(str(model), prompts, str(out), settings, on_step=_progress(name, steps)).seconds


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of a warm start."""

    name: str  # of what is learnt in it
    rows: Iterable[Mapping[str, Any]]  # with prompt and answer
    settings: SupervisedConfig


def settings(steps: int, *, learning_rate: float = 3e-3, batch_rows: int = 64) -> SupervisedConfig:
    """What suits the tiny model: its learning rate falls to 0 over the steps."""
    return SupervisedConfig(
        learning_rate=learning_rate,
        betas=(0.9, 0.95),
        weight_decay=0.01,
        schedule=Schedule.LINEAR,
        warmup_steps=min(20, steps // 4),
        decay_steps=steps,
        batch_rows=batch_rows,
        threads=1,
    )


def from_nothing(name: str, *phases: Phase) -> None:
    """Train a model with random weights, phase by phase, and write it to runs/examples/models/NAME.

    The run of that name below runs/examples, if there is one, is removed: it began from an earlier model.

    Args:
        name: of the example.
        phases: at least one.
    """
    out = RUNS / "models" / name
    for old in (out, RUNS / name):
        shutil.rmtree(old, ignore_errors=True)
    print("warm start: supervised training of a model with random weights", flush=True)
    seconds = 0.0
    with tempfile.TemporaryDirectory() as folder:
        model, file = Path(folder) / "random", Path(folder) / "rows.jsonl"
        tiny_model.build(model)
        for phase in phases:
            make_data.write(file, phase.rows)
            trained = out if phase is phases[-1] else Path(folder) / phase.name
            seconds += train(model, file, trained, phase.settings, name=phase.name)
            model = trained
    print(f"  {seconds:.0f} s\n", flush=True)


def _progress(name: str, steps: int) -> Callable[[int, StepNumbers], None]:
    def on_step(step: int, numbers: StepNumbers) -> None:
        if step % SAID_EVERY == 0 or step == steps:
            print(f"  {name}: step {step}/{steps}, loss {numbers.loss:.2f} nats per token", flush=True)

    return on_step
