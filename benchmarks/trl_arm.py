"""TRL's GRPOTrainer on the long-tailed task; runs with the python of .venv-trl, which `make test-trl` makes.

One JSON object on stdin says what to do, see `Orders`; on stdout come JSON lines: {"ready": ...} when the trainer is
built, and at each evaluation {"step", "seconds", "samples", "reward"}. The seconds are those of training alone: the
clock stands still while it evaluates.
"""

import json
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks import long_tail_task
from benchmarks.expected_reward import expected_reward, problems


@dataclass(frozen=True)
class Orders:
    """What both arms are told."""

    model: str  # directory
    seed: int
    steps: int  # at most
    every: int  # steps between evaluations
    target: float  # held-out reward that ends the run
    groups_per_step: int
    group_size: int
    learning_rate: float
    max_tokens: int
    threads: int
    settings: dict[str, Any]  # further ones of GRPOConfig


def configured(orders: Orders, directory: str) -> GRPOConfig:
    """GRPO as recipes/grpo.toml has it, on policy: one optimiser step for each batch, all of it at once."""
    rollouts = orders.groups_per_step * orders.group_size
    table: dict[str, Any] = {
        "output_dir": directory,
        "seed": orders.seed,
        "max_steps": orders.steps,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        # sampling
        "num_generations": orders.group_size,
        "generation_batch_size": rollouts,
        "max_completion_length": orders.max_tokens,
        "temperature": 1.0,
        # objective
        "loss_type": "grpo",
        "scale_rewards": "group",
        "beta": 0.0,
        "epsilon": 0.2,
        "num_iterations": 1,
        "mask_truncated_completions": False,
        # optimiser
        "per_device_train_batch_size": rollouts,
        "gradient_accumulation_steps": 1,
        "learning_rate": orders.learning_rate,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "optim": "adamw_torch",
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        # nothing beside the training
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    return GRPOConfig(**{**table, **orders.settings})


def reward(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """The task's verifier, as TRL calls it."""
    return [long_tail_task.score(text, right) for text, right in zip(completions, answer, strict=True)]


class Evaluated(TrainerCallback):  # type: ignore[misc]  # this environment has no types
    """Scores the policy every few steps, beside the clock, and ends the training when it is good enough."""

    def __init__(self, orders: Orders, tokenizer: Any) -> None:
        self._orders = orders
        self._problems = problems(tokenizer, long_tail_task.rows()[1])
        self._seconds = self._since = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        self._score(model, 0)
        self._since = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        self._seconds += time.perf_counter() - self._since
        if state.global_step % self._orders.every == 0:
            control.should_training_stop |= self._score(model, state.global_step) >= self._orders.target
        self._since = time.perf_counter()

    def _score(self, model: Any, step: int) -> float:
        model.eval()
        found = expected_reward(model, self._problems)
        model.train()
        samples = step * self._orders.groups_per_step * self._orders.group_size
        say({"step": step, "seconds": self._seconds, "samples": samples, "reward": found})
        return found


def say(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


def main() -> None:
    """Train as stdin says."""
    began = time.perf_counter()
    orders = Orders(**json.loads(sys.stdin.readline()))
    torch.set_num_threads(orders.threads)
    tokenizer = AutoTokenizer.from_pretrained(orders.model)
    train = long_tail_task.rows()[0]
    with tempfile.TemporaryDirectory() as directory:
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(orders.model, dtype=torch.float32),
            reward_funcs=reward,
            args=configured(orders, directory),
            train_dataset=Dataset.from_list(train),
            processing_class=tokenizer,
            callbacks=[Evaluated(orders, tokenizer)],
        )
        say({"ready": time.perf_counter() - began, "threads": torch.get_num_threads()})
        trainer.train()


if __name__ == "__main__":
    main()
