"""What a GPU is given: Qwen3's shapes with random weights, rollouts that fill a packed row, and their arithmetic.

    floating-point operations of a step = 6 x weights x rows + 12 x pairs x heads x width x layers

The head's weights count for the rows that it is asked of. Pairs are those of query and key that see each other: half
of rows x rows in one causal sequence, and far fewer in a row of many answers. What gradient checkpointing computes a
second time is no work done.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import Qwen3Config

from millrace.core.types import (
    Group,
    GroupId,
    GroupVerdict,
    Prompt,
    Rollout,
    Verdict,
    VerdictKind,
    VersionRun,
)
from millrace.learner.judged import Judged

GROUP_SIZE = 8
MEDIAN_TOKENS, SPREAD = 1200, 0.9  # of answers: log-normal, the 99th percentile eight times the median
ROLLOUTS, SEQUENCE = "rollouts", "sequence"


def qwen3(name: str, *, rows: int) -> Qwen3Config:
    """The dimensions of Qwen3 "0.6B" or "4B", or of "tiny", which fits a CPU."""
    hidden, inner, layers, heads, keys, width, vocabulary = {
        "0.6B": (1024, 3072, 28, 16, 8, 128, 151_936),
        "4B": (2560, 9728, 36, 32, 8, 128, 151_936),
        "tiny": (32, 64, 2, 2, 1, 16, 512),
    }[name]
    return Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        head_dim=width,
        max_position_embeddings=max(40_960, rows),
        tie_word_embeddings=True,
    )


def answers(kind: str, rows: int, rng: np.random.Generator) -> list[tuple[int, list[int]]]:
    """Lengths of prompt and answers, group by group, that fill a row: no answer's last token takes a row.

    Args:
        kind: ROLLOUTS, groups of eight answers behind prompts of 1/128 of the row; or SEQUENCE, one long answer, and a
            short one to compare it with.
    """
    prompt = max(1, rows // 128)
    if kind == SEQUENCE:
        return [(prompt, [rows - prompt - 2, 4])]
    scale = min(1.0, rows / 16_384)
    groups: list[tuple[int, list[int]]] = []
    left = rows
    while left > prompt + 1:
        groups.append((prompt, []))
        left -= prompt
        while left > 0 and len(groups[-1][1]) < GROUP_SIZE:
            drawn = int(np.clip(rng.lognormal(np.log(MEDIAN_TOKENS * scale), SPREAD), 4, rows // 2))
            taken = min(drawn, left + 1)
            groups[-1][1].append(taken)
            left -= taken - 1
    if len(groups[-1][1]) == 1:  # alone it would have nothing to be compared with, and leave the batch
        (alone,) = groups[-1][1]
        groups[-1] = (prompt, [alone // 2 + 1, alone - alone // 2])
    return groups


def judged(lengths: Sequence[tuple[int, list[int]]], vocabulary: int, rng: np.random.Generator) -> list[Judged]:
    """Random rollouts of these lengths; scores are continuous, so that no group is skipped."""
    groups = []
    for draw, (prompt, answers) in enumerate(lengths):
        rollouts = tuple(
            Rollout(
                tokens_T=rng.integers(4, vocabulary, many, dtype=np.int32),
                sampled_T=np.ones(many, np.bool_),
                behaviour_logprob_T=rng.normal(-np.log(vocabulary), 1, many).astype(np.float32),
                versions=(VersionRun(0, 0, many),),
                finish_reason="stop",
                seed=0,
            )
            for many in answers
        )
        asked = Prompt(id=str(draw), text="", tokens_P=rng.integers(4, vocabulary, prompt, dtype=np.int32))
        group = Group(id=GroupId(draw, 0), prompt=asked, rollouts=rollouts, lease_epoch=0)
        scored = tuple(Verdict(kind=VerdictKind.SCORED, score=float(score)) for score in rng.normal(size=len(answers)))
        groups.append(Judged.of(group, GroupVerdict(id=group.id, verdicts=scored), [0] * len(answers)))
    return groups


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Of one step on one packed row."""

    weights: int  # of the matrices in all blocks
    head_weights: int
    rows: int
    loss_tokens: int
    pairs: int
    heads: int
    width: int
    layers: int

    @staticmethod
    def of(config: Qwen3Config, *, rows: int, loss_tokens: int, pairs: int) -> "Work":
        """Of a model of these dimensions."""
        hidden, width = config.hidden_size, config.head_dim
        attention = hidden * width * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
        block = attention + 3 * hidden * config.intermediate_size
        return Work(
            weights=block * config.num_hidden_layers,
            head_weights=hidden * config.vocab_size,
            rows=rows,
            loss_tokens=loss_tokens,
            pairs=pairs,
            heads=config.num_attention_heads,
            width=width,
            layers=config.num_hidden_layers,
        )

    @property
    def matrices(self) -> int:
        """Floating-point operations of the weights' products, forward and backward."""
        return 6 * (self.weights * self.rows + self.head_weights * self.loss_tokens)

    @property
    def attention(self) -> int:
        """Those of attention: two products per pair forward, four backward."""
        return 12 * self.pairs * self.heads * self.width * self.layers

    @property
    def operations(self) -> int:
        """All of them."""
        return self.matrices + self.attention
