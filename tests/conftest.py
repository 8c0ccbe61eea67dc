"""What several folders' tests share: tiny models on disk, and tasks that a table can learn."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from millrace.learner.table_model import TableConfig, TableForCausalLM

CHARACTERS = "0123456789+= abcdefghijklmnopqrstuvwxyz"
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")


def character_tokenizer(characters: str = CHARACTERS) -> PreTrainedTokenizerFast:
    """One token per character."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *characters])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def table_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a table policy that knows nothing, and a character tokenizer."""
    directory = tmp_path_factory.mktemp("models") / "table"
    tokenizer = character_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = TableForCausalLM(TableConfig(vocab_size=len(tokenizer), positions=16, eos_token_id=2))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def digit_model(table_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, warm-started: behind `a=b` it answers with some digit and ends, so that a tenth is right."""
    directory = tmp_path_factory.mktemp("models") / "digits"
    model = TableForCausalLM.from_pretrained(table_model)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(table_model)
    digits = tokenizer.convert_tokens_to_ids(list("0123456789"))
    with torch.no_grad():
        for digit in digits:
            model.table[digit, 2, digits] = 6.0
            model.table[digit, 3, tokenizer.eos_token_id] = 9.0
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def write_rows(path: Path, rows: Sequence[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def copy_task(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Train and held-out files: answer with the digit that the prompt ends in."""
    folder = tmp_path_factory.mktemp("copy_task")
    rows = [{"prompt": f"{a}={b}", "answer": str(b), "level": a} for a in range(10) for b in range(10)]
    return {
        "train": write_rows(folder / "train.jsonl", rows[:80]),
        "held_out": write_rows(folder / "held_out.jsonl", rows[80:]),
    }
