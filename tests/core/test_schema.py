"""The pack: what goes in comes out, in place, in a few bytes per token."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from millrace.core import schema
from millrace.core.errors import DataError
from millrace.core.types import Group, GroupId, Prompt, Rollout, VersionRun


def rollout(rng: np.random.Generator, length: int, *, injected: bool = False) -> Rollout:
    cut = int(rng.integers(0, length + 1))
    runs = [VersionRun(3, 0, cut), VersionRun(4, cut, length)]
    sampled = np.ones(length, np.bool_)
    if injected and length:
        sampled[0] = False
    return Rollout(
        tokens_T=rng.integers(0, 1000, length).astype(np.int32),
        sampled_T=sampled,
        behaviour_logprob_T=rng.normal(size=length).astype(np.float32),
        versions=tuple(run for run in runs if run.end > run.start) or (VersionRun(3, 0, 0),),
        finish_reason="stop" if length % 2 else "length",
        seed=int(rng.integers(0, 2**31)),
    )


def group(rng: np.random.Generator, draw: int, lengths: list[int], *, injected: bool = False) -> Group:
    prompt = Prompt(
        id=f"train:{draw}",
        text="sört ",
        tokens_P=np.arange(draw % 5 + 1, dtype=np.int32),
        answer=None if draw % 2 else "1",
        row={"level": draw} if draw % 3 else {},
    )
    rollouts = tuple(rollout(rng, length, injected=injected) for length in lengths)
    return Group(id=GroupId(draw, 0), prompt=prompt, rollouts=rollouts, lease_epoch=draw + 7)


def same(a: Group, b: Group) -> None:
    assert (a.id, a.lease_epoch, len(a.rollouts)) == (b.id, b.lease_epoch, len(b.rollouts))
    assert (a.prompt.id, a.prompt.text, a.prompt.answer, dict(a.prompt.row)) == (
        b.prompt.id,
        b.prompt.text,
        b.prompt.answer,
        dict(b.prompt.row),
    )
    np.testing.assert_array_equal(a.prompt.tokens_P, b.prompt.tokens_P)
    for x, y in zip(a.rollouts, b.rollouts, strict=True):
        np.testing.assert_array_equal(x.tokens_T, y.tokens_T)
        np.testing.assert_array_equal(x.sampled_T, y.sampled_T)
        np.testing.assert_array_equal(x.behaviour_logprob_T, y.behaviour_logprob_T)
        assert (x.versions, x.finish_reason, x.seed) == (y.versions, y.finish_reason, y.seed)
        assert (x.tokens_T.dtype, x.behaviour_logprob_T.dtype) == (np.int32, np.float32)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4), max_size=5), st.booleans())
def test_decode_returns_what_was_encoded(shapes: list[list[int]], injected: bool) -> None:
    rng = np.random.default_rng(0)
    groups = [group(rng, i, lengths, injected=injected) for i, lengths in enumerate(shapes)]
    for a, b in zip(groups, schema.decode(schema.encode(groups)), strict=True):
        same(a, b)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_select_moves_rows_between_packs_in_any_order(data: st.DataObject) -> None:
    rng = np.random.default_rng(1)
    groups = [group(rng, i, [3 + i, 0, 2], injected=i == 2) for i in range(5)]
    packs = [schema.encode(groups[:2]), schema.encode(groups[2:])]
    places = [(packs[0], 0), (packs[0], 1), (packs[1], 0), (packs[1], 1), (packs[1], 2)]
    chosen = data.draw(st.lists(st.integers(0, 4), max_size=8))
    for i, b in zip(chosen, schema.decode(schema.select([places[i] for i in chosen])), strict=True):
        same(groups[i], b)


def test_headers_agree_with_the_groups() -> None:
    rng = np.random.default_rng(2)
    groups = [group(rng, i, [4, 7, 1]) for i in range(3)]
    selected = schema.select([(schema.encode(groups), 2), (schema.encode(groups), 0)])
    for expected, header in zip((groups[2], groups[0]), schema.headers(selected), strict=True):
        assert (header.id, header.lease_epoch, header.n) == (expected.id, expected.lease_epoch, 3)
        assert (header.tokens, header.oldest_version) == (expected.tokens, expected.oldest_version)
        assert header.runs == tuple(r.versions for r in expected.rollouts)


def test_a_long_pack_needs_little_more_than_eight_bytes_per_token() -> None:
    rng = np.random.default_rng(3)
    groups = [group(rng, i, [576] * 8) for i in range(16)]
    assert len(schema.encode(groups)) / sum(g.tokens for g in groups) < 8.3


def test_a_selected_row_leaves_the_other_rows_bytes_behind() -> None:
    rng = np.random.default_rng(4)
    pack = schema.encode([group(rng, i, [200] * 4) for i in range(10)])
    assert len(schema.select([(pack, 3)])) < len(pack) / 5


def test_foreign_bytes_are_refused_by_name() -> None:
    with pytest.raises(DataError, match="no pack of schema version 1: they begin with b'PK"):
        schema.read(b"PK\x03\x04" * 10)


def test_arrays_of_another_type_are_converted_or_refused_never_cut() -> None:
    one = group(np.random.default_rng(0), 3, [5])
    first = one.rollouts[0]
    wide = replace(first, tokens_T=first.tokens_T.astype(np.int64))
    (found,) = schema.decode(schema.encode([replace(one, rollouts=(wide, first))]))
    for each in found.rollouts:
        assert each.tokens_T.dtype == np.int32
        np.testing.assert_array_equal(each.tokens_T, first.tokens_T)
    too_wide = replace(first, tokens_T=np.full(5, 2**40))
    with pytest.raises(pa.ArrowInvalid, match="not in range"):
        schema.encode([replace(one, rollouts=(too_wide,))])
