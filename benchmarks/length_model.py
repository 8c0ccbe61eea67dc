"""A policy whose response lengths are stated: its own weights end a response with a chosen probability per token.

Embeddings are orthogonal and the blocks add next to nothing to them, so that the last token alone decides what comes
next: the output layer holds a table of log-probabilities. The first token of a response chooses a class; each class
goes on with its own letters and ends with its own hazard. So lengths are a mixture of geometric distributions, cut at
the sampling's limit, and independent of each other. All matrix products are made as in any model of this shape.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from examples import make_data, tiny_model

LETTERS = 4  # of a class
NEVER = -14.0  # nats: once in a million tokens
BLOCK_SCALE = 1e-4  # of what a block adds to the residual stream
FIRST_CLASS = len(tiny_model.SPECIAL) + tiny_model.CHARACTERS.index("A")
EOS = 2
ROWS = 256
CONTEXT_TOKENS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Of the model: what its speed depends on."""

    hidden: int = 128
    layers: int = 4
    heads: int = 4


@dataclass(frozen=True, slots=True)
class Class:
    """A part of all responses."""

    share: float
    mean: float  # tokens, the last one among them; infinite: until the limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Of all responses."""

    classes: tuple[Class, ...]
    limit: int  # tokens: `sampling.max_tokens`

    def survival(self, longer_than: int) -> float:
        """The share of responses with more tokens than that.

        >>> FLAT.survival(31), FLAT.survival(32)
        (1.0, 0.0)
        """
        if longer_than >= self.limit:
            return 0.0
        return sum(each.share * (1 - 1 / each.mean) ** longer_than for each in self.classes)

    def quantile(self, share: float) -> int:
        """The shortest length that so large a share of responses does not exceed."""
        return next(length for length in range(self.limit + 1) if self.survival(length) <= 1 - share)

    @property
    def mean(self) -> float:
        return sum(self.survival(length) for length in range(self.limit))

    def mean_longest(self, of: int) -> float:
        """The expected longest of so many responses."""
        return sum(1 - (1 - self.survival(length)) ** of for length in range(self.limit))


FLAT = Lengths(classes=(Class(1.0, float("inf")),), limit=32)
TAIL = Lengths(classes=(Class(0.9, 21.0), Class(0.1, 70.0)), limit=320)  # 99th percentile: 10 medians
KINDS = {"flat": FLAT, "tail": TAIL}


def transitions(classes: Sequence[Class], vocabulary: int) -> np.ndarray:
    """Log-probability of each token after each token, [V, V], nats, up to a constant per row."""
    table = np.full((vocabulary, vocabulary), NEVER)
    own = [FIRST_CLASS + number * LETTERS + np.arange(LETTERS) for number in range(len(classes))]
    for each, letters in zip(classes, own, strict=True):
        table[:, letters] = np.log(each.share / LETTERS)  # what is no letter, the prompt's end, chooses a class
    for each, letters in zip(classes, own, strict=True):
        hazard = 1 / each.mean
        table[letters] = NEVER
        table[np.ix_(letters, letters)] = np.log((1 - hazard) / LETTERS)
        table[letters, EOS] = np.log(hazard) if hazard else NEVER
    return table


def build(directory: Path, lengths: Lengths, shape: Shape | None = None, *, seed: int = 0) -> None:
    """Write model and tokenizer."""
    shape = shape or Shape()
    config = LlamaConfig(
        vocab_size=len(tiny_model.SPECIAL) + len(tiny_model.CHARACTERS),
        hidden_size=shape.hidden,
        intermediate_size=3 * shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=EOS,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    orthogonal = np.linalg.qr(np.random.default_rng(seed).normal(size=(shape.hidden, shape.hidden)))[0]
    embedding = orthogonal[: config.vocab_size] * np.sqrt(shape.hidden)  # rows of mean square 1: norms leave them
    table = transitions(lengths.classes, config.vocab_size)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(torch.from_numpy(embedding))
        model.get_output_embeddings().weight.copy_(torch.from_numpy(table.T @ embedding / shape.hidden))
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_(BLOCK_SCALE)
    model.save_pretrained(directory)
    tiny_model.tokenizer().save_pretrained(directory)


def write_rows(path: Path) -> None:
    """Prompts of equal length; a letter at random to compare a response with makes rewards vary."""
    random = np.random.default_rng(0)
    answers = ["".join(random.choice(list("ABCD"), 64)) for _ in range(ROWS)]
    make_data.write(path, ({"prompt": f"{number:03d}:", "answer": answer} for number, answer in enumerate(answers)))
