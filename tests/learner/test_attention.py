"""Packed rows with shared prompts against one sequence at a time, values and gradients."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from millrace.core.errors import ModelError
from millrace.learner.assemble import Microbatch, Sample, pack
from millrace.learner.attention import Bucket, Plan, Spans, packed_attention
from millrace.learner.logprobs import logprobs_of_logits
from millrace.learner.model import Inputs, logprobs

ARCHITECTURES = ["qwen2", "qwen2-untied", "qwen3", "llama", "llama-untied", "gpt2", "gpt2-untied", "gemma3"]
SHAPES = [(5, (4, 7, 1)), (9, (20, 3)), (3, (11, 2, 6)), (30, (2, 1)), (1, (8, 40))]


def samples_of(group_of: Callable, shapes=SHAPES) -> list[Sample]:
    rng = np.random.default_rng(1)
    samples = []
    for index, (prompt, lengths) in enumerate(shapes):
        group = group_of(index, prompt, lengths, rng)
        for rollout in group.rollouts:
            n = len(rollout)
            sample = Sample(
                group=index,
                prompt_P=group.prompt.tokens_P,
                token_T=rollout.tokens_T,
                behaviour_logprob_T=rollout.behaviour_logprob_T,
                lag_T=np.zeros(n, np.int32),
                place_N=np.arange(n),
                weight_N=np.ones(n, np.float32),
            )
            samples.append(sample)
    return samples


def one_by_one(model: PreTrainedModel, samples: list[Sample]) -> torch.Tensor:
    model.set_attn_implementation("eager")
    parts = []
    for sample in samples:
        row = torch.from_numpy(np.concatenate([sample.prompt_P, sample.token_T]).astype(np.int64))
        n = len(sample.token_T)
        logits = model(input_ids=row[None], use_cache=False).logits[0]
        parts.append(logprobs_of_logits(logits[-n - 1 : -1], row[-n:])[0])
    model.set_attn_implementation("millrace_packed")
    return torch.cat(parts)


def gradients(model: PreTrainedModel, logprob_N: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    weight_N = torch.linspace(-1, 1, len(logprob_N))
    (logprob_N * weight_N).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_packed_row_equals_one_sequence_at_a_time_in_values_and_gradients(name, make_model, group_of):
    model = make_model(name)
    samples = samples_of(group_of)
    packed_N, _ = logprobs(model, Inputs.of(pack(samples), model.device))
    packed_gradients = gradients(model, packed_N)
    single_N = one_by_one(model, samples)
    single_gradients = gradients(model, single_N)
    assert (packed_N - single_N).abs().max() < 1e-5
    assert packed_gradients.keys() == single_gradients.keys()
    for parameter, gradient in single_gradients.items():
        scale = max(1.0, float(gradient.abs().max()))
        assert (packed_gradients[parameter] - gradient).abs().max() / scale < 1e-5, parameter


def leaking(micro: Microbatch) -> Microbatch:
    """What position ids alone would give: a group of two responses as one causal sequence."""
    prompt = int(np.flatnonzero(micro.position_C == 0)[-1]) + int(micro.position_C[micro.row_N[0]]) + 1
    one = np.array([0])
    spans = Spans(
        prompt_start_K=one,
        prompt_length_K=one + prompt,
        prompt_S=one,
        start_S=one + prompt,
        length_S=one + len(micro.token_C) - prompt,
    )
    return replace(micro, plan=Plan.of(spans))


def test_a_planted_leak_between_responses_is_seen(make_model, group_of):
    model = make_model("qwen2")
    samples = samples_of(group_of, [(5, (6, 7))])
    micro = pack(samples)
    clean_N, _ = logprobs(model, Inputs.of(micro, model.device))
    leaked_N, _ = logprobs(model, Inputs.of(leaking(micro), model.device))
    single_N = one_by_one(model, samples)
    assert (clean_N - single_N).abs().max() < 1e-5
    assert (leaked_N - single_N).abs().max() > 1e-2


def test_the_leak_of_use_cache_does_not_reach_a_plan(make_model, group_of):
    """transformers drops packing where a cache is made; our rows do not depend on what it detects."""
    model = make_model("qwen2")
    inputs = Inputs.of(pack(samples_of(group_of)), model.device)
    row = {"input_ids": inputs.token_C[None], "position_ids": inputs.position_C[None], "packed_plan": inputs.plan}
    without = model(use_cache=False, **row).logits
    assert torch.equal(model(use_cache=True, **row).logits, without)


@given(
    st.lists(
        st.tuples(st.integers(1, 40), st.lists(st.integers(1, 60), min_size=1, max_size=5)), min_size=1, max_size=6
    )
)
@settings(max_examples=60, deadline=None)
def test_every_row_is_computed_once_and_sees_its_prompt_and_its_past_alone(shapes):
    starts, spans, owner, position, at = [], [], [], [], 0
    for index, (prompt, lengths) in enumerate(shapes):
        starts.append((at, prompt))
        owner += [(index, -1)] * prompt
        position += range(prompt)
        at += prompt
        for member, length in enumerate(lengths):
            spans.append((index, at, length - 1))
            owner += [(index, member)] * (length - 1)
            position += range(prompt, prompt + length - 1)
            at += length - 1
    start_K, span_S = np.array(starts), np.array(spans)
    plan = Plan.of(
        Spans(
            prompt_start_K=start_K[:, 0],
            prompt_length_K=start_K[:, 1],
            prompt_S=span_S[:, 0],
            start_S=span_S[:, 1],
            length_S=span_S[:, 2],
        )
    )
    assert plan.cells == at
    places = np.concatenate([bucket.query_BQ.flatten().numpy() for bucket in plan.buckets])
    np.testing.assert_array_equal(places[plan.order_C.numpy()], np.arange(at))
    computed = set(plan.order_C.tolist())
    offset = 0
    for index, bucket in enumerate(plan.buckets):
        size_b, size_q = bucket.query_BQ.shape
        mask = plan.mask(index, None)
        if mask is None:
            mask = torch.ones(size_q, size_q, dtype=torch.bool).tril()[None, None]
        mask = mask.expand(size_b, 1, size_q, -1)[:, 0]
        for b in range(size_b):
            for q in range(size_q):
                if offset + b * size_q + q not in computed:
                    continue
                row = int(bucket.query_BQ[b, q])
                seen = bucket.key_BK[b][mask[b, q]].tolist()
                group, member = owner[row]
                allowed = [
                    r
                    for r in range(at)
                    if owner[r][0] == group and owner[r][1] in (-1, member) and position[r] <= position[row]
                ]
                assert sorted(seen) == allowed
        offset += size_b * size_q


def test_a_window_leaves_no_padded_query_without_a_key():
    """A softmax over nothing is NaN, and its gradient would poison every row."""
    queries = torch.zeros(2, 20, dtype=torch.long)
    bucket = Bucket(query_BQ=queries, key_BK=torch.zeros(2, 101, dtype=torch.long), offset_B=torch.tensor([100, 3]))
    mask = bucket.mask(8)
    assert mask is not None and bool(mask.any(-1).all())
    assert mask[1, 0, 10].nonzero().flatten().tolist() == list(range(6, 14))


def packed_call(**kwargs):
    module = SimpleNamespace(config=SimpleNamespace(model_type="oddformer"))
    x = torch.zeros(1, 1, 2, 4)
    one = np.array([0])
    spans = Spans(prompt_start_K=one, prompt_length_K=one + 2, prompt_S=one, start_S=one, length_S=one)
    plan = Plan.of(spans)
    return packed_attention(module, x, x, x, None, **{"packed_plan": plan, **kwargs})


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias"])
def test_what_packed_attention_does_not_compute_is_refused_by_name(name):
    packed_call(**{name: None})
    with pytest.raises(ModelError, match=f"'oddformer' asks its attention for {name}, which .* use a model without it"):
        packed_call(**{name: 1.0})


def test_a_model_that_swallows_the_plan_is_refused():
    with pytest.raises(ModelError, match="'oddformer' does not hand 'packed_plan' to its attention layers"):
        packed_call(packed_plan=None)


def test_long_tails_are_bucketed_and_equal_lengths_are_not():
    def plan_of(lengths):
        lengths = np.array(lengths)
        start_S = 8 + np.cumsum(lengths) - lengths
        one = np.array([0])
        return Plan.of(
            Spans(prompt_start_K=one, prompt_length_K=one + 8, prompt_S=lengths * 0, start_S=start_S, length_S=lengths)
        )

    assert len(plan_of([200] * 32).buckets) == 2
    tail = plan_of([400, 200, 100, 50, 30, 20] * 8)
    assert len(tail.buckets) > 3
    assert tail.padded_cells < 1.25 * tail.cells
