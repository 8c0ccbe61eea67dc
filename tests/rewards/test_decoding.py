"""Texts are those of the model's tokenizer, whether transformers reads it or not."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from millrace.core.errors import ModelError
from millrace.rewards import decoding

VOCABULARY = {"<pad>": 0, "<eos>": 1, "<unk>": 2, "a": 3, "b": 4, "c": 5, "<tool>": 6, " ": 7, ".": 8}


def saved(directory: Path) -> Path:
    inner = Tokenizer(models.BPE(vocab=VOCABULARY, merges=[], unk_token="<unk>"))
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    tokenizer.save_pretrained(directory)
    return directory


def edited(directory: Path, **changes: object) -> Path:
    file = saved(directory) / decoding.CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return directory


ROWS = [[3, 4, 1], [5, 7, 8, 6, 5], [0, 0], []]


def by_transformers(directory: Path) -> list[str]:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    texts: list[str] = tokenizer.batch_decode(ROWS, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return texts


def decoded(directory: Path) -> list[str]:
    return list(decoding.decoder(str(directory))([np.array(row, np.int32) for row in ROWS]))


def test_special_tokens_are_left_out(tmp_path: Path) -> None:
    assert decoding.whole(saved(tmp_path)) is not None
    assert decoded(tmp_path) == ["ab", "c .<tool>c", "", ""] == by_transformers(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"additional_special_tokens": ["<tool>"]},
        {"extra_special_tokens": ["<tool>"]},
        {"extra_special_tokens": {"tool_token": "<tool>"}},
        {"sep_token": "<tool>"},
        {"cls_token": {"__type": "AddedToken", "content": "<tool>", "special": True}},
        {
            "added_tokens_decoder": {
                "6": {
                    "content": "<tool>",
                    "special": True,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "single_word": False,
                }
            }
        },
    ],
    ids=["additional", "extra", "by name", "named", "spelled out", "decoder"],
)
def test_where_another_file_names_a_special_token_transformers_reads_them(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    edited(tmp_path, **changes)
    assert decoding.whole(tmp_path) is None
    assert decoded(tmp_path) == by_transformers(tmp_path)


@pytest.mark.parametrize("missing", [decoding.FILE, decoding.CONFIG])
def test_without_either_file_transformers_is_asked(tmp_path: Path, missing: str) -> None:
    (saved(tmp_path) / missing).unlink()
    assert decoding.whole(tmp_path) is None


def test_a_model_without_a_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"the tokenizer of {tmp_path}"):
        decoding.decoder(str(tmp_path))
