"""Packed attention on a GPU: one call of flex_attention, whose tiles of 128 queries by 128 keys are known beforehand.

    seen(query, key) = the key lies in the query's own run, no later than it, or in the prompt of that run

Tiles that hold no seen pair are skipped, tiles that hold nothing else are computed without asking pair by pair. Both
are counted from where the runs lie, never from rows x rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad

BLOCK = 128  # rows of a tile
LEAST_WIDTH = 16  # of a head: the kernels' matrix products take no narrower ones

Indices = NDArray[np.int64]
MaskMod = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Runs:
    """Runs of rows that attend causally within themselves, each behind a prompt, which may be empty."""

    start_R: Indices
    length_R: Indices
    prompt_start_R: Indices
    prompt_length_R: Indices

    @property
    def rows(self) -> int:
        """Of all runs; they lie without gaps."""
        return int(self.length_R.sum())

    @property
    def pairs(self) -> int:
        """Of query and key that see each other: what attention must compute."""
        own_R = self.length_R * (self.length_R + 1) // 2
        return int((own_R + self.length_R * self.prompt_length_R).sum())


def block_mask(runs: Runs, window: int | None, device: torch.device) -> BlockMask:
    """Who sees whom in a row, padded to whole tiles with rows that see themselves alone.

    Args:
        runs: of the row.
        window: keys that a query sees at most, itself among them, counted along prompt and run; None: all of them.
    """
    blocks = -(-runs.rows // BLOCK)
    touched_QK, full_QK = tiles(runs, window)
    partial_QK = touched_QK & ~full_QK

    def listed(chosen_QK: NDArray[np.bool_]) -> tuple[torch.Tensor, torch.Tensor]:
        order_QK = np.argsort(~chosen_QK, axis=1, kind="stable").astype(np.int32)
        count_Q = chosen_QK.sum(1, dtype=np.int32)
        return tuple(torch.from_numpy(x).to(device)[None, None] for x in (count_Q, order_QK))  # type: ignore[return-value]  # two

    partial, full = listed(partial_QK), listed(full_QK)
    rows = blocks * BLOCK
    return BlockMask.from_kv_blocks(*partial, *full, BLOCK_SIZE=BLOCK, mask_mod=_mask_mod(runs, rows, window, device))


def tiles(runs: Runs, window: int | None) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which tiles of queries by keys hold a seen pair, and which hold no other, [Q, K] each."""
    blocks = -(-runs.rows // BLOCK)
    some = runs.length_R > 0
    start_R, end_R = runs.start_R[some], (runs.start_R + runs.length_R)[some]
    behind = some & (runs.prompt_length_R > 0)
    first_R, last_R = runs.start_R[behind], (runs.start_R + runs.length_R)[behind]
    key_R = runs.prompt_start_R[behind]
    tail = np.array([runs.rows]), np.array([blocks * BLOCK])  # each row of it sees itself: as good as causal here
    own = _Cut.of(start_R, end_R, start_R, end_R)
    prompts = _Cut.of(first_R, last_R, key_R, key_R + runs.prompt_length_R[behind])
    padding = _Cut.of(*tail, *tail) if tail[0] < tail[1] else None
    # Keys of a prompt are as far behind as if the run followed it at once.
    gap = (first_R - key_R - runs.prompt_length_R[behind])[prompts.part]
    sure = np.zeros(blocks * blocks, np.int64)
    touched = np.zeros(blocks * blocks, np.bool_)
    for cut, distance, causal in ((own, 0, True), (prompts, gap, False), (padding, 0, True)):
        if cut is None:
            continue
        pairs = cut.pairs(causal=causal)
        nearest, furthest = cut.distances(distance)
        place = cut.query_block * blocks + cut.key_block
        inside = np.full(len(place), True) if window is None else furthest < window
        reached = (pairs > 0) & (True if window is None else nearest < window)
        touched[place[reached]] = True
        if cut is not padding:
            np.add.at(sure, place[inside], pairs[inside])
    shape = (blocks, blocks)
    return touched.reshape(shape), (sure == BLOCK * BLOCK).reshape(shape)


@dataclass(frozen=True, slots=True)
class _Cut:
    """Rectangles of queries by keys, cut along the tiles: one entry for each pair of a rectangle and a tile."""

    part: Indices  # which rectangle
    query_block: Indices
    key_block: Indices
    queries: tuple[Indices, Indices]  # from, to
    keys: tuple[Indices, Indices]

    @staticmethod
    def of(query_start: Indices, query_end: Indices, key_start: Indices, key_end: Indices) -> "_Cut":
        first_query, first_key = query_start // BLOCK, key_start // BLOCK
        wide = (key_end - 1) // BLOCK - first_key + 1
        many = ((query_end - 1) // BLOCK - first_query + 1) * wide
        part = np.repeat(np.arange(len(many)), many)
        at = np.arange(len(part)) - np.repeat(np.cumsum(many) - many, many)
        query_block, key_block = first_query[part] + at // wide[part], first_key[part] + at % wide[part]
        return _Cut(
            part,
            query_block,
            key_block,
            _overlap(query_start[part], query_end[part], query_block),
            _overlap(key_start[part], key_end[part], key_block),
        )

    def pairs(self, *, causal: bool) -> Indices:
        """Seen ones. Causal rectangles have the same rows on both sides, so that a tile is whole, half or empty."""
        queries, keys = self.queries[1] - self.queries[0], self.keys[1] - self.keys[0]
        if not causal:
            return queries * keys
        half = np.where(self.key_block == self.query_block, queries * (queries + 1) // 2, 0)
        return np.where(self.key_block < self.query_block, queries * keys, half)

    def distances(self, gap: Indices | int) -> tuple[Indices, Indices]:
        """The nearest and the furthest key, in rows behind its query."""
        nearest = self.queries[0] - (self.keys[1] - 1) - gap
        return nearest, self.queries[1] - 1 - self.keys[0] - gap


def _overlap(start: Indices, end: Indices, block: Indices) -> tuple[Indices, Indices]:
    return np.maximum(start, block * BLOCK), np.minimum(end, (block + 1) * BLOCK)


def _mask_mod(runs: Runs, rows: int, window: int | None, device: torch.device) -> MaskMod:
    """The rule pair by pair, of a row padded to `rows`."""
    per_row = np.tile(np.arange(rows, dtype=np.int32), (3, 1))  # own start, prompt start, prompt end: empty in padding
    for place, value_R in enumerate((runs.start_R, runs.prompt_start_R, runs.prompt_start_R + runs.prompt_length_R)):
        at = np.repeat(runs.start_R, runs.length_R) + _within(runs.length_R)
        per_row[place, at] = np.repeat(value_R, runs.length_R)
    own_C, start_C, end_C = (torch.from_numpy(x.copy()).to(device) for x in per_row)

    def seen(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        own = (key >= own_C[query]) & (key <= query)
        return own | ((key >= start_C[query]) & (key < end_C[query]))

    def seen_in_window(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        assert window is not None
        own = (key >= own_C[query]) & (key <= query) & (query - key < window)
        behind = query - key - (own_C[query] - end_C[query])
        return own | ((key >= start_C[query]) & (key < end_C[query]) & (behind < window))

    return seen if window is None else seen_in_window


def _within(length_R: Indices) -> Indices:
    """0, 1, ... within each run."""
    return np.arange(length_R.sum()) - np.repeat(np.cumsum(length_R) - length_R, length_R)


def takes(query: torch.Tensor, value: torch.Tensor, *, dropout: float) -> bool:
    """Whether a layer's attention can be computed here."""
    return query.device.type == "cuda" and min(query.shape[-1], value.shape[-1]) >= LEAST_WIDTH and dropout == 0.0


def attend(
    mask: BlockMask, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float | None
) -> torch.Tensor:
    """[1, heads, C, width] each -> [1, C, heads, width], in autocast's type where it is on.

    Compiled on a GPU; elsewhere, uncompiled, it holds rows x rows and has no gradient.
    """
    kind, rows = query.device.type, query.shape[2]
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    missing = mask.shape[-1] - rows
    # Whole tiles, so that the compiled kernel needs no second form for rows that end within one.
    query, key, value = (pad(x.to(dtype), (0, 0, 0, missing)) if missing else x.to(dtype) for x in (query, key, value))
    call: Any = _compiled() if kind == "cuda" else flex_attention
    outcome: torch.Tensor = call(
        query, key, value, block_mask=mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    return outcome[:, :, :rows].transpose(1, 2)


@cache
def _compiled() -> Any:
    """One kernel for every length. Uncompiled it would hold rows x rows."""
    never_fall_back()
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def never_fall_back() -> None:
    """What can no longer be compiled fails; by itself the compiler would go on uncompiled, without a word.

    The limit leaves room for each combination of window, type of products, and with gradients or without.
    """
    torch._dynamo.config.recompile_limit = 32
    torch._dynamo.config.fail_on_recompile_limit_hit = True
