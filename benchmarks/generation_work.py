"""What both arms of benchmarks/generation.py are given, and what they answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from millrace.actors.datasets.config import DataConfig
from millrace.actors.datasets.loading import load
from millrace.actors.prompt_source import DatasetOrder
from millrace.core.types import Prompt
from millrace.learner.tokenizer import load_tokenizer

EOS = 2  # of examples/tiny_model.py


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One burst: the same for both arms."""

    groups: int
    group_size: int
    max_tokens: int
    stops: bool  # at the end-of-sequence token, so that lengths differ; else all responses have max_tokens
    publish_every: int = 0  # steps between weight updates while the burst runs (ours only); 0: none
    seeded: bool = False  # one seed per request (raw only; ours always reproduces each response)

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        return (EOS,) if self.stops else ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What an arm is built with."""

    model: str
    data: str
    directory: str
    slots: int
    max_model_len: int
    cores: tuple[int, ...]  # that its process may use
    engine: str = "vllm"


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What a burst came to."""

    tokens: int  # by the engine's own count
    seconds: float
    cpu_s: float  # of all threads of the arm's process: what a busy machine changes least
    details: Mapping[str, Any]


def prompts(setting: Setting) -> Sequence[Prompt]:
    """The data, tokenised."""
    config = DataConfig(train=setting.data)
    tokenizer = load_tokenizer(setting.model)
    return load(setting.data, tokenizer, config, context_tokens=setting.max_model_len, max_new_tokens=1)


def order(rows: Sequence[Prompt]) -> DatasetOrder:
    """What is drawn, in both arms."""
    return DatasetOrder(rows, seed=0)
