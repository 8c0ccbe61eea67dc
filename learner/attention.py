"""Attention over packed rows in which every group's prompt stands once.

A packed row is, group by group, ``[prompt][response 1][response 2]...``. Positions of every response go on
where its prompt ends; its tokens see the prompt and what precedes them in the same response, nothing else.
Position ids cannot express that, so the row's `Plan` travels to the attention function as a keyword argument
of the model's forward pass. On a CPU prompts and responses are gathered into buckets of similar length, each bucket is
one call of scaled dot product attention, and the outcome is gathered back into the row. On a GPU flex.py computes the
row as it lies, unless heads are too narrow for its kernels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from millrace.core.errors import ModelError
from millrace.learner import flex

NAME = "millrace_packed"
KEYWORD = "packed_plan"

# A bucket takes one more sequence while that one fills this share of the bucket's query-by-key rectangle.
FILL = 0.8
# ... or while the bucket's rectangle stays below this: one more call would cost more than its padding.
SMALL = 8_192

Indices = NDArray[np.int64]
CPU = torch.device("cpu")

# What transformers hands to attention functions and ours can do without: it says nothing on who sees whom
# beyond what the plan says.
_IGNORED = frozenset(
    {
        "cache_position",
        "cu_seq_lens_k",
        "cu_seq_lens_q",
        "is_causal",
        "max_length_k",
        "max_length_q",
        "output_attentions",
        "output_hidden_states",
        "position_ids",
        "return_dict",
        "use_cache",
        "position_embeddings",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spans:
    """Where K prompts and S responses lie in a packed row. A response may have no rows."""

    prompt_start_K: Indices
    prompt_length_K: Indices
    prompt_S: Indices  # the prompt of each response, an index into K
    start_S: Indices
    length_S: Indices

    def runs(self) -> flex.Runs:
        """Prompts, which stand behind nothing, and responses behind theirs."""
        return flex.Runs(
            start_R=np.concatenate([self.prompt_start_K, self.start_S]),
            length_R=np.concatenate([self.prompt_length_K, self.length_S]),
            prompt_start_R=np.concatenate([self.prompt_start_K, self.prompt_start_K[self.prompt_S]]),
            prompt_length_R=np.concatenate([np.zeros_like(self.prompt_length_K), self.prompt_length_K[self.prompt_S]]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Sequences of similar length, right-padded with row 0, whose outcome is never read."""

    query_BQ: torch.Tensor  # rows of the packed row, [B, Q]
    key_BK: torch.Tensor  # [B, K]; a response's keys are its prompt's rows, then its own
    offset_B: torch.Tensor  # position of the first query; [1] where all are equal

    def to(self, device: torch.device) -> "Bucket":
        """The same on another device; queries that are also the keys stay one tensor."""
        query_BQ = self.query_BQ.to(device)
        key_BK = query_BQ if self.is_causal else self.key_BK.to(device)
        return Bucket(query_BQ=query_BQ, key_BK=key_BK, offset_B=self.offset_B.to(device))

    @property
    def is_causal(self) -> bool:
        """Queries and keys are the same rows."""
        return self.query_BQ is self.key_BK

    def mask(self, window: int | None) -> torch.Tensor | None:
        """[B or 1, 1, Q, K]: True where the query sees the key. None: plain causal attention."""
        keys = self.key_BK.shape[1]
        windowed = window is not None and keys > window
        if self.is_causal and not windowed:
            return None
        device = self.query_BQ.device
        position_BQ1 = (self.offset_B[:, None] + torch.arange(self.query_BQ.shape[1], device=device))[..., None]
        position_K = torch.arange(keys, device=device)
        seen = position_K <= position_BQ1
        if windowed:
            assert window is not None
            # Right padding can lie a window behind every key; row 0 of the keys keeps its softmax finite.
            seen = seen & ((position_K > position_BQ1 - window) | (position_BQ1 >= keys) & (position_K == 0))
        return seen[:, None]


@dataclass(slots=True, kw_only=True)
class Plan:
    """How one packed row attends. Made once per micro-batch, used by every layer."""

    runs: flex.Runs
    buckets: Sequence[Bucket]
    order_C: torch.Tensor  # place of each row in the concatenated outcomes of the buckets
    cells: int  # query rows of the packed row
    padded_cells: int  # query rows of all buckets, padding included
    device: torch.device = CPU  # where it is to be used: buckets follow when they are asked for
    windows: set[int | None] = field(default_factory=set)  # sliding windows that layers asked for
    _placed: tuple[Sequence[Bucket], torch.Tensor] | None = None
    _masks: dict[tuple[int, int | None], torch.Tensor | None] = field(default_factory=dict)
    _block_masks: dict[int | None, BlockMask] = field(default_factory=dict)

    @staticmethod
    def of(spans: Spans) -> "Plan":
        """Bucket prompts among themselves, and responses by their own and their prompt's length."""
        none_K = np.zeros_like(spans.prompt_length_K)
        rows = [_Rows(spans.prompt_start_K, spans.prompt_length_K, none_K, none_K)]
        some = spans.length_S > 0
        prompt_S = spans.prompt_S[some]
        starts = spans.prompt_start_K[prompt_S]
        rows.append(_Rows(spans.start_S[some], spans.length_S[some], starts, spans.prompt_length_K[prompt_S]))
        buckets: list[Bucket] = []
        placed: list[tuple[Indices, Indices]] = []  # rows, their places
        offset = 0
        for part in rows:
            for members in part.split():
                bucket, rows_of, places = part.bucket(members)
                buckets.append(bucket)
                placed.append((rows_of, offset + places))
                offset += bucket.query_BQ.numel()
        cells = sum(len(rows_of) for rows_of, _ in placed)
        order_C = np.empty(cells, np.int64)
        for rows_of, places in placed:
            order_C[rows_of] = places
        order = torch.from_numpy(order_C)
        return Plan(runs=spans.runs(), buckets=buckets, order_C=order, cells=cells, padded_cells=offset)

    def to(self, device: torch.device) -> "Plan":
        """The same on another device."""
        if self.device == device:
            return self
        return Plan(
            runs=self.runs,
            buckets=self.buckets,
            order_C=self.order_C,
            cells=self.cells,
            padded_cells=self.padded_cells,
            device=device,
        )

    def placed(self) -> tuple[Sequence[Bucket], torch.Tensor]:
        """Buckets and `order_C` on the device."""
        if self._placed is None:
            self._placed = [bucket.to(self.device) for bucket in self.buckets], self.order_C.to(self.device)
        return self._placed

    def mask(self, index: int, window: int | None) -> torch.Tensor | None:
        """Of bucket `index`, made once per window."""
        key = (index, window)
        if key not in self._masks:
            self._masks[key] = self.placed()[0][index].mask(window)
        return self._masks[key]

    def block_mask(self, window: int | None) -> BlockMask:
        """Of the whole row, for a GPU; made once per window."""
        if window not in self._block_masks:
            self._block_masks[window] = flex.block_mask(self.runs, window, self.device)
        return self._block_masks[window]


@dataclass(frozen=True, slots=True)
class _Rows:
    """Runs of rows, each behind a prefix of other rows."""

    start_B: Indices
    length_B: Indices
    prefix_start_B: Indices
    prefix_length_B: Indices

    def split(self) -> list[Indices]:
        """Members of each bucket: longest first, a new bucket where padding would outgrow a further call."""
        order = np.lexsort((-self.prefix_length_B, -self.length_B))
        buckets: list[Indices] = []
        start = 0
        queries = keys = 0
        for at, member in enumerate(order):
            length, total = int(self.length_B[member]), int(self.length_B[member] + self.prefix_length_B[member])
            wider = max(keys, total)
            rectangle = queries * wider
            grown = (wider - keys) * queries * (at - start)
            if at > start and length * total + SMALL / (at - start + 1) < FILL * rectangle + grown:
                buckets.append(order[start:at])
                start, queries, keys = at, length, total
            else:
                queries, keys = max(queries, length), wider
        if len(order):
            buckets.append(order[start:])
        return buckets

    def bucket(self, members: Indices) -> tuple[Bucket, Indices, Indices]:
        """The bucket of these members, the rows it computes, and their places in its flattened outcome."""
        start_B1, length_B1 = self.start_B[members, None], self.length_B[members, None]
        query_Q = np.arange(length_B1.max())
        valid_BQ = query_Q < length_B1
        query_BQ = np.where(valid_BQ, start_B1 + query_Q, 0)
        prefix_B1 = self.prefix_length_B[members, None]
        queries = torch.from_numpy(query_BQ)
        keys = queries
        if prefix_B1.any():
            key_K = np.arange((length_B1 + prefix_B1).max())
            own_BK = np.where(key_K < prefix_B1 + length_B1, start_B1 + key_K - prefix_B1, 0)
            key_BK = np.where(key_K < prefix_B1, self.prefix_start_B[members, None] + key_K, own_BK)
            keys = torch.from_numpy(key_BK)
        offset_B = prefix_B1[:1, 0] if (prefix_B1 == prefix_B1[0]).all() else prefix_B1[:, 0]
        bucket = Bucket(query_BQ=queries, key_BK=keys, offset_B=torch.from_numpy(offset_B))
        return bucket, query_BQ[valid_BQ], np.flatnonzero(valid_BQ)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that transformers calls in every layer.

    Args:
        query, key, value: [1, heads, C, width]; fewer key than query heads is grouped-query attention.
        sliding_window: keys that a query sees, itself among them.
    Returns:
        The outcome, [1, C, heads, width], and no attention weights.
    Raises:
        ModelError: the architecture asks for what this function does not compute.
    """
    plan = kwargs.pop(KEYWORD, None)
    _refuse(module, plan, attention_mask, kwargs)
    plan.windows.add(sliding_window)
    if flex.takes(query, value, dropout=dropout):
        return flex.attend(plan.block_mask(sliding_window), query, key, value, scale=scaling), None
    query_C, key_C, value_C = (x[0].transpose(0, 1) for x in (query, key, value))
    grouped = query_C.shape[1] != key_C.shape[1]
    buckets, order_C = plan.placed()
    outcomes = []
    for index, bucket in enumerate(buckets):
        mask = plan.mask(index, sliding_window)
        outcome = scaled_dot_product_attention(
            _gather(query_C, bucket.query_BQ),
            _gather(key_C, bucket.key_BK),
            _gather(value_C, bucket.key_BK),
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=grouped,
        )
        outcomes.append(outcome.transpose(1, 2).flatten(0, 1))
    return torch.cat(outcomes).index_select(0, order_C)[None], None


def _gather(rows_C: torch.Tensor, index_BL: torch.Tensor) -> torch.Tensor:
    """[C, heads, width] -> [B, heads, L, width]."""
    return rows_C.index_select(0, index_BL.flatten()).view(*index_BL.shape, *rows_C.shape[1:]).transpose(1, 2)


def _refuse(
    module: torch.nn.Module, plan: Plan | None, attention_mask: torch.Tensor | None, rest: dict[str, Any]
) -> None:
    config = getattr(module, "config", None)
    whose = f"model type '{getattr(config, 'model_type', type(module).__name__)}'"
    if not isinstance(plan, Plan):
        raise ModelError(
            f"{whose} does not hand '{KEYWORD}' to its attention layers, so packed sequences would see each other;"
            " use a model whose forward passes keyword arguments on, such as Qwen2, Qwen3, Llama, Gemma or GPT-2"
        )
    if attention_mask is not None:
        raise ModelError(f"{whose} makes an attention mask of its own, which a packed row cannot honour")
    asked = sorted(name for name, value in rest.items() if value is not None and name not in _IGNORED)
    if asked:
        raise ModelError(
            f"{whose} asks its attention for {', '.join(asked)}, which packed attention does not compute;"
            " use a model without it (no logit soft-capping in attention, no attention sinks, no position bias)"
        )


AttentionInterface.register(NAME, packed_attention)
