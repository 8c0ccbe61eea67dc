"""The tokenizer is the one that AutoTokenizer gives, whether AutoTokenizer is imported or not."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import Split
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.auto import tokenization_auto

from millrace.learner import tokenizer as module
from millrace.learner.table_config import TableConfig
from millrace.learner.tokenizer import load_tokenizer, own_tokenizers

TEXT = "ab  a b"


def saved(directory: Path, model_type: str, **said: object) -> Path:
    """A model directory without a model, whose tokenizer splits character by character."""
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2, "a": 3, "b": 4, " ": 5}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    inner.pre_tokenizer, inner.decoder = Split("", "isolated"), decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(directory)
    AutoConfig.for_model(model_type, vocab_size=6).save_pretrained(directory)
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **said}))
    return directory


@pytest.mark.parametrize("named", module.GENERIC)
@pytest.mark.parametrize(
    "model_type", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gpt2", "gpt_neox", TableConfig.model_type]
)
def test_it_is_what_auto_tokenizer_gives(tmp_path: Path, model_type: str, named: str) -> None:
    saved(tmp_path, model_type, tokenizer_class=named)
    found, auto = load_tokenizer(str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    assert type(found) is type(auto)
    assert found(TEXT).input_ids == auto(TEXT).input_ids
    assert found.all_special_tokens == auto.all_special_tokens


def test_the_types_with_tokenizers_of_their_own_are_those_of_transformers() -> None:
    assert own_tokenizers() == tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS


@pytest.mark.parametrize(
    ("said", "generic"),
    [
        ({"tokenizer_class": "TokenizersBackend"}, True),
        ({"tokenizer_class": "LlamaTokenizer"}, False),
        ({"tokenizer_class": None}, False),
        ({"tokenizer_class": "TokenizersBackend", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}, False),
    ],
)
def test_what_the_files_leave_open_is_left_to_auto_tokenizer(
    tmp_path: Path, said: dict[str, object], generic: bool
) -> None:
    assert module._is_generic(str(saved(tmp_path, "llama", **said))) is generic
    (tmp_path / "tekken.json").touch()
    assert not module._is_generic(str(tmp_path))
