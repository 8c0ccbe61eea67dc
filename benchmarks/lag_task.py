"""A task on which old samples mislead: a chain of letters, worth as much of it as is right before the first mistake.

After each letter comes the next of the alphabet, round and round: `ab` asks for `cdeabc`. The policy is a softmax
table that knows the last letter and the position, and begins uniform, so that a whole chain is right once in 15,625
samples, and each letter is learnt only when those before it are right. What an old sample says of a late letter was
said of the wrong letters before it.
"""

import json
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from benchmarks.harness import ROOT
from millrace.cluster import config as configs
from millrace.cluster.config import RunConfig
from millrace.learner.table_model import TableConfig, TableForCausalLM

LETTERS = "abcde"
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
NEVER = -30.0  # logit of a special token: so small a probability that its gradient is nothing even to Adam
PROMPT, ANSWER = 2, 6  # letters
STEPS, GROUPS_PER_STEP, GROUP_SIZE, MINIBATCHES = 200, 8, 8, 2
ENDLESS = STEPS  # a bound that never binds
EVALUATION_SAMPLES = 64
SLOTS_AT_MOST = 32 * GROUPS_PER_STEP * GROUP_SIZE


def right(last: str) -> str:
    """The answer to a prompt that ends in this letter.

    >>> right("b")
    'cdeabc'
    """
    start = LETTERS.index(last) + 1
    return "".join(LETTERS[(start + place) % len(LETTERS)] for place in range(ANSWER))


def chain(text: str, answer: str) -> float:
    """The share of the answer that is right before the first mistake.

    >>> chain("cdxabc", "cdeabc") == 2 / 6
    True
    """
    same = takewhile(lambda pair: pair[0] == pair[1], zip(text, answer, strict=False))
    return sum(1 for _ in same) / len(answer)


def write(folder: Path) -> None:
    """`model`, `train.jsonl` and `held_out.jsonl`: a fifth of the prompts, those that begin with the last letter."""
    rows = [{"prompt": first + last, "answer": right(last)} for first in LETTERS for last in LETTERS]
    for name, kept in {
        "train": [row for row in rows if row["prompt"][0] != LETTERS[-1]],
        "held_out": [row for row in rows if row["prompt"][0] == LETTERS[-1]],
    }.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *LETTERS])}
    characters = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    characters.decoder = decoders.Fuse()
    pad, bos, eos, unk = SPECIAL
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters, pad_token=pad, bos_token=bos, eos_token=eos, unk_token=unk
    )
    model = TableForCausalLM(
        TableConfig(vocab_size=len(vocabulary), positions=PROMPT + ANSWER, eos_token_id=vocabulary[eos])
    )
    with torch.no_grad():
        model.table[..., : len(SPECIAL)] = NEVER
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


def run(
    folder: Path, runs: Path, objective: Mapping[str, Any], *, lag: int, seed: int, learning_rate: float
) -> RunConfig:
    """A run of it, in whose queue the generation is always as far ahead as admission lets it be.

    Args:
        folder: what `write` has filled.
        runs: where its directory goes.
        objective: the slots that make the correction; the others are the same for all.
        lag: the bound, in steps.
    """
    ahead = min(SLOTS_AT_MOST, (lag + 1) * GROUPS_PER_STEP * GROUP_SIZE)
    table = {
        "model": str(folder / "model"),
        "recipe": {
            "rewards": {"verifier": f"{ROOT / 'benchmarks' / 'lag_task.py'}:chain"},
            "objective": {"advantage": "grpo", "aggregation": "token_mean", **objective},
            "updates": {"minibatches": MINIBATCHES},
        },
        "data": {"train": str(folder / "train.jsonl"), "held_out": str(folder / "held_out.jsonl")},
        "loop": {"steps": STEPS, "groups_per_step": GROUPS_PER_STEP, "group_size": GROUP_SIZE, "max_lag": lag},
        "sampling": {"max_tokens": ANSWER},
        "generation": {
            "engine": "table",
            "slots": ahead,
            "prefetch": ahead // GROUP_SIZE,
            "linger_s": 0.005,
            "heartbeat_s": 0.2,
        },
        "rewards": {"linger_s": 0.005, "heartbeat_s": 0.2},
        "learner": {
            "learning_rate": learning_rate,
            "threads": 1,
            "seed": seed,
            "checkpoint_every": STEPS,
            "samples_per_step": 0,
        },
        "evaluation": {"every": STEPS, "samples": EVALUATION_SAMPLES},
        "journal": {"on_disk": False},
        "seed": seed,
        "runs": str(runs),
    }
    return configs.of(table, root=folder, source="lag_task", name=f"lag-{lag}")
