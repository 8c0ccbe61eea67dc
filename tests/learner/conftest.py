"""Small models, groups and a one-group objective, for the learner's tests."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from millrace.core.types import Group, GroupId, GroupVerdict, Prompt, Rollout, Verdict, VerdictKind, VersionRun
from millrace.learner import attention
from millrace.learner.table_model import TableConfig, TableForCausalLM
from tests.learner.table_loop import LENGTH as TABLE_LENGTH
from tests.learner.table_loop import VOCABULARY as TABLE_VOCABULARY

torch.set_num_threads(1)

VOCABULARY = 61
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def config_of(name: str) -> PreTrainedConfig:
    tied = not name.endswith("-untied")
    match name.removesuffix("-untied"):
        case "qwen2":
            return Qwen2Config(**SIZES, tie_word_embeddings=tied)
        case "qwen3":
            return Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=tied)
        case "llama":
            return LlamaConfig(**SIZES, tie_word_embeddings=tied)
        case "gemma3":
            layers = ["sliding_attention", "full_attention"]
            return Gemma3TextConfig(
                **SIZES,
                head_dim=8,
                sliding_window=6,
                layer_types=layers,
                tie_word_embeddings=tied,
                final_logit_softcapping=5.0,
            )
        case "gpt2":
            special = {"bos_token_id": 1, "eos_token_id": 2}
            return GPT2Config(
                vocab_size=VOCABULARY,
                n_embd=32,
                n_layer=2,
                n_head=4,
                n_positions=256,
                tie_word_embeddings=tied,
                **special,
            )
    raise KeyError(name)


def random_model(name: str, seed: int = 0) -> PreTrainedModel:
    """Every parameter random and far from its initial value, so that no term of the forward pass is negligible."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_of(name), attn_implementation=attention.NAME).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(scope="session")
def make_model() -> Callable[..., PreTrainedModel]:
    return random_model


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Characters a..z and the like: id 0 pads, 2 ends."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {chr(97 + i - 3): i for i in range(3, VOCABULARY)}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    inner.pre_tokenizer = Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.fixture
def model_dir(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Callable[..., str]:
    def save(model: PreTrainedModel, name: str = "model") -> str:
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return save


def make_group(
    draw: int,
    prompt: int,
    lengths: Sequence[int],
    rng: np.random.Generator,
    *,
    runs: Sequence[Sequence[VersionRun]] | None = None,
    vocabulary: int = VOCABULARY,
) -> Group:
    rollouts = tuple(
        Rollout(
            tokens_T=rng.integers(3, vocabulary, length, dtype=np.int32),
            sampled_T=np.ones(length, np.bool_),
            behaviour_logprob_T=-rng.random(length, dtype=np.float32),
            versions=tuple(runs[at]) if runs else (VersionRun(0, 0, length),),
            finish_reason="stop",
            seed=at,
        )
        for at, length in enumerate(lengths)
    )
    tokens = rng.integers(3, vocabulary, prompt, dtype=np.int32)
    return Group(
        id=GroupId(draw, 0),
        prompt=Prompt(id=f"row:{draw}", text="", tokens_P=tokens),
        rollouts=rollouts,
        lease_epoch=1,
    )


@pytest.fixture(scope="session")
def group_of() -> Callable[..., Group]:
    return make_group


def verdicts_of(group: Group, scores: Sequence[float | None]) -> GroupVerdict:
    """None: the judge failed."""
    return GroupVerdict(
        id=group.id,
        verdicts=tuple(
            Verdict(kind=VerdictKind.JUDGE_FAILED if s is None else VerdictKind.SCORED, score=s) for s in scores
        ),
    )


@pytest.fixture(scope="session")
def judged() -> Callable[..., GroupVerdict]:
    return verdicts_of


@pytest.fixture
def table_dir(model_dir: Callable[..., str]) -> str:
    config = TableConfig(vocab_size=TABLE_VOCABULARY, positions=TABLE_LENGTH, eos_token_id=2)
    return model_dir(TableForCausalLM(config))
