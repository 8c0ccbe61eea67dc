"""The GPU's attention: its tiles against PyTorch's own, pair by pair against the runs, its outcome against buckets."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.functional import scaled_dot_product_attention

from millrace.core.errors import ModelError
from millrace.learner import flex
from millrace.learner.attention import Plan, Spans, packed_attention

BLOCK = 8
Shapes = list[tuple[int, list[int]]]  # prompt length, lengths of its responses


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "BLOCK", BLOCK)


def spans_of(shapes: Shapes) -> Spans:
    prompts, responses, at = [], [], 0
    for index, (prompt, lengths) in enumerate(shapes):
        prompts.append((at, prompt))
        at += prompt
        for length in lengths:
            responses.append((index, at, length))
            at += length
    prompt_KX, response_SX = np.array(prompts), np.array(responses, np.int64).reshape(-1, 3)
    return Spans(
        prompt_start_K=prompt_KX[:, 0],
        prompt_length_K=prompt_KX[:, 1],
        prompt_S=response_SX[:, 0],
        start_S=response_SX[:, 1],
        length_S=response_SX[:, 2],
    )


def visible(shapes: Shapes, window: int | None) -> torch.Tensor:
    """[C, C], from the definition."""
    owner, position = [], []
    for index, (prompt, lengths) in enumerate(shapes):
        owner += [(index, -1)] * prompt
        position += range(prompt)
        for member, length in enumerate(lengths):
            owner += [(index, member)] * length
            position += range(prompt, prompt + length)

    def sees(q: int, k: int) -> bool:
        related = owner[q][0] == owner[k][0] and owner[k][1] in (-1, owner[q][1])
        return related and 0 <= position[q] - position[k] < (window or len(owner))

    return torch.tensor([[sees(q, k) for k in range(len(owner))] for q in range(len(owner))])


many_shapes = st.lists(st.tuples(st.integers(1, 30), st.lists(st.integers(0, 30), max_size=4)), min_size=1, max_size=4)


@given(many_shapes, st.sampled_from([None, 3, 12]))
@settings(max_examples=40, deadline=None)
def test_tiles_are_those_of_every_pair(shapes, window):
    runs = spans_of(shapes).runs()
    flex.BLOCK = BLOCK  # hypothesis outlives the fixture's own example
    mask = flex.block_mask(runs, window, torch.device("cpu"))
    expected_CC = visible(shapes, window)
    rows, padded = runs.rows, mask.shape[-1]
    assert padded == -(-rows // BLOCK) * BLOCK
    index = torch.arange(padded)
    seen = mask.mask_mod(torch.tensor(0), torch.tensor(0), index[:, None], index[None])
    assert torch.equal(seen[:rows, :rows], expected_CC)
    assert not seen[:rows, rows:].any() and seen[rows:].sum(1).eq(1).all(), "padding sees itself alone"
    theirs = create_block_mask(mask.mask_mod, None, None, padded, padded, device="cpu", BLOCK_SIZE=BLOCK)
    assert torch.equal(mask.to_dense(), theirs.to_dense())
    tile = seen.view(padded // BLOCK, BLOCK, padded // BLOCK, BLOCK)
    touched_QK, full_QK = flex.tiles(runs, window)
    assert np.array_equal(touched_QK, tile.any(3).any(1).numpy())
    assert np.array_equal(full_QK, tile.all(3).all(1).numpy())
    if window is None:
        assert runs.pairs == int(expected_CC.sum())


SHAPES: Shapes = [(5, [4, 7, 0]), (40, [20, 3]), (1, [8, 33])]


def heads(rows: int, *, query: int = 4, key: int = 2, width: int = 16) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(1, many, rows, width, generator=rng) for many in (query, key, key)]


@pytest.mark.parametrize("window", [None, 6])
def test_its_outcome_is_that_of_the_buckets(window):
    plan = Plan.of(spans_of(SHAPES))
    q, k, v = heads(plan.cells)
    module = SimpleNamespace(config=SimpleNamespace(model_type="test"))
    bucketed, _ = packed_attention(module, q, k, v, None, scaling=0.3, sliding_window=window, packed_plan=plan)
    outcome = flex.attend(plan.block_mask(window), q, k, v, scale=0.3)
    assert outcome.shape == bucketed.shape
    torch.testing.assert_close(outcome, bucketed, atol=2e-6, rtol=1e-5)


def test_gradients_through_its_rule_are_those_of_the_buckets():
    plan = Plan.of(spans_of(SHAPES))
    mask = plan.block_mask(None)
    index = torch.arange(plan.cells)
    seen = mask.mask_mod(torch.tensor(0), torch.tensor(0), index[:, None], index[None])
    module = SimpleNamespace(config=SimpleNamespace(model_type="test"))
    gradients = []
    for bucketed in (True, False):
        parts = [x.requires_grad_() for x in heads(plan.cells)]
        if bucketed:
            outcome, _ = packed_attention(module, *parts, None, packed_plan=plan)
        else:
            outcome = scaled_dot_product_attention(*parts, attn_mask=seen, enable_gqa=True).transpose(1, 2)
        (outcome * torch.linspace(-1, 1, plan.cells)[None, :, None, None]).sum().backward()
        gradients.append([x.grad for x in parts])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("shapes", [SHAPES, [(BLOCK, [BLOCK])]])
def test_under_autocast_all_three_are_of_one_type(shapes, monkeypatch):
    """Norms of queries and keys leave them in float32 where values are bfloat16, which the kernel refuses."""
    plan = Plan.of(spans_of(shapes))
    q, k, v = heads(plan.cells)
    types = []

    def spy(*parts: torch.Tensor, **kwargs: object) -> torch.Tensor:
        types.extend(x.dtype for x in parts)
        return parts[0]

    monkeypatch.setattr(flex, "flex_attention", spy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outcome = flex.attend(plan.block_mask(None), q, k, v.bfloat16(), scale=None)
    assert types == [torch.bfloat16] * 3 and outcome.shape == (1, plan.cells, 4, 16)


def test_a_long_sequence_holds_half_of_its_tiles(monkeypatch):
    monkeypatch.setattr(flex, "BLOCK", 128)
    touched_QK, full_QK = flex.tiles(spans_of([(65_536, [])]).runs(), None)
    blocks = 512
    assert touched_QK.sum() == blocks * (blocks + 1) // 2 and full_QK.sum() == blocks * (blocks - 1) // 2


def test_a_cpu_keeps_its_buckets_and_narrow_heads_keep_them_everywhere():
    q, _, v = heads(8)
    assert not flex.takes(q, v, dropout=0.0)
    on_gpu = SimpleNamespace(device=torch.device("cuda"), shape=(1, 4, 8, 16))
    narrow = SimpleNamespace(device=torch.device("cuda"), shape=(1, 4, 8, 8))
    assert flex.takes(on_gpu, on_gpu, dropout=0.0)
    assert not flex.takes(on_gpu, narrow, dropout=0.0) and not flex.takes(on_gpu, on_gpu, dropout=0.1)


def test_what_it_cannot_compute_is_refused_before_it_is_asked():
    module = SimpleNamespace(config=SimpleNamespace(model_type="oddformer"))
    x = torch.zeros(1, 1, 2, 16)
    with pytest.raises(ModelError, match="softcap"):
        packed_attention(module, x, x, x, None, packed_plan=Plan.of(spans_of([(2, [])])), softcap=1.0)
