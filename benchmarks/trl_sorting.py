"""TRL's GRPOTrainer on sorting; runs with the python of .venv-trl, which `make test-trl` makes.

One JSON object on stdin says what to do, as for trl_arm.py; on stdout comes one JSON line, {"samples_per_s": ...}, of
all steps but the first few.
"""

import json
import sys
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOTrainer

from benchmarks.harness import ROOT
from benchmarks.trl_arm import Orders, configured

SKIPPED = 5  # steps, whose caches are cold


def reward(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """The verifier `exact`, as TRL calls it."""
    return [float(text.strip() == right) for text, right in zip(completions, answer, strict=True)]


class Timed(TrainerCallback):  # type: ignore[misc]  # this environment has no types
    """The time at the end of each step."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.at.append(time.perf_counter())


def main() -> None:
    """Train as stdin says."""
    orders = Orders(**json.loads(sys.stdin.readline()))
    torch.set_num_threads(orders.threads)
    rows = [json.loads(line) for line in (ROOT / "examples" / "sorting" / "train.jsonl").read_text().splitlines()]
    timed = Timed()
    with tempfile.TemporaryDirectory() as directory:
        GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(orders.model, dtype=torch.float32),
            reward_funcs=reward,
            args=configured(orders, directory),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(orders.model),
            callbacks=[timed],
        ).train()
    steps = len(timed.at) - 1 - SKIPPED
    samples = steps * orders.groups_per_step * orders.group_size
    print(json.dumps({"samples_per_s": samples / (timed.at[-1] - timed.at[SKIPPED])}), flush=True)


if __name__ == "__main__":
    main()
