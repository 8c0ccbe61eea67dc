"""The demo's model opens like any other, and its tokenizer is one token per character."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tiny_model = script("tiny_model")
TOKENIZER = tiny_model.tokenizer()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("tiny")
    tiny_model.build(path, seed=1)
    return path


@given(st.text(tiny_model.CHARACTERS))
def test_a_character_is_a_token_and_a_text_comes_back_unchanged(text: str) -> None:
    ids = TOKENIZER(text)["input_ids"]
    assert ids == [len(tiny_model.SPECIAL) + tiny_model.CHARACTERS.index(char) for char in text]
    assert TOKENIZER.decode([*ids, TOKENIZER.eos_token_id], skip_special_tokens=True) == text


def test_other_characters_are_one_unknown_token_each() -> None:
    assert TOKENIZER("aé!")["input_ids"] == [
        TOKENIZER.convert_tokens_to_ids("a"),
        TOKENIZER.unk_token_id,
        TOKENIZER.convert_tokens_to_ids("!"),
    ]


def test_the_directory_opens_with_the_auto_classes(directory: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    assert len(tokenizer) == model.config.vocab_size == model.get_input_embeddings().weight.shape[0]
    assert 300_000 <= sum(p.numel() for p in model.parameters()) <= 800_000
    special = (model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id)
    assert special == (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer("sort 1=")["input_ids"] == TOKENIZER("sort 1=")["input_ids"]
    assert tokenizer.decode(tokenizer("a b\n c")["input_ids"]) == "a b\n c"


def test_every_example_prompt_is_spelt_without_unknown_tokens() -> None:
    for path in EXAMPLES.rglob("*.jsonl"):
        assert TOKENIZER.unk_token_id not in TOKENIZER(path.read_text())["input_ids"]


def test_a_seed_fixes_the_weights_and_leaves_the_generator_alone(directory: Path, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    tiny_model.build(tmp_path / "same", seed=1)
    tiny_model.build(tmp_path / "other", seed=2)
    assert torch.equal(before, torch.get_rng_state())
    weights = [
        AutoModelForCausalLM.from_pretrained(path).get_input_embeddings().weight
        for path in (directory, tmp_path / "same", tmp_path / "other")
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
