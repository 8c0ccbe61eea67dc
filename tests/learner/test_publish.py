"""The flat buffer, its manifest and its probes."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from millrace.core.protocols import WeightHandle
from millrace.core.weights import digest_of, factors_of, identity_of, poured, view_of, views, write
from millrace.learner import publish
from millrace.learner.config import LoraConfig
from millrace.learner.lora import Adapters
from millrace.learner.model import Policy
from millrace.learner.publish import Publisher, probe_sequences


@pytest.mark.parametrize("name", ["qwen2", "qwen2-untied", "gpt2"])
def test_a_receiver_can_rebuild_the_model_from_the_buffer(name, make_model, tmp_path):
    model = make_model(name)
    manifest, buffer = Publisher(Policy(model)).pack(version=3, step=2, epoch=1)
    assert (manifest.version, manifest.step, manifest.epoch) == (3, 2, 1)
    assert manifest.digest == digest_of(buffer)
    assert [t.name for t in manifest.tensors] == [name for name, _ in model.named_parameters()]
    handle: WeightHandle = write(tmp_path, manifest, buffer)
    other = AutoModelForCausalLM.from_config(model.config, attn_implementation="millrace_packed").eval()
    with torch.no_grad():
        for parameter_name, parameter in other.named_parameters():
            parameter.copy_(torch.from_numpy(views(handle)[parameter_name].copy()))
    for probe in manifest.probes:
        gap = np.abs(Policy(other).score(probe.tokens_T) - probe.logprob_T).max()
        assert gap < 1e-6 < manifest.tolerance


@pytest.mark.parametrize("part_bytes", [192, 4096, 1 << 20])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_in_however_many_parts_a_file_holds_the_same_bytes(dtype, part_bytes, make_model, tmp_path, monkeypatch):
    """The tensors one after the other, each from a multiple of 64 bytes on, with zeros between them."""
    model = make_model("qwen2")
    manifest, buffer = Publisher(Policy(model), dtype=dtype).pack(version=3, step=2, epoch=1)
    monkeypatch.setattr(publish, "PART_BYTES", part_bytes)
    packed = Publisher(Policy(model), dtype=dtype).packed(version=3, step=2, epoch=1)
    assert max(map(len, packed.parts())) <= part_bytes and packed.size == buffer.size
    assert poured(packed, tmp_path / "first").digest == manifest.digest == digest_of(buffer)
    assert np.array_equal(np.fromfile(tmp_path / "first", np.uint8), buffer)
    given = dict(model.named_parameters())
    covered = np.zeros(buffer.size, np.bool_)
    for tensor in manifest.tensors:
        there = slice(tensor.offset, tensor.offset + tensor.size)
        expected = given[tensor.name].detach().to(getattr(torch, dtype)).reshape(-1).view(torch.uint8)
        assert np.array_equal(buffer[there], expected.numpy())
        covered[there] = True
    assert not buffer[~covered].any()


@pytest.mark.parametrize("part_bytes", [64, 128, 4096])
def test_tensors_of_odd_sizes_begin_at_multiples_of_64_bytes(part_bytes, monkeypatch):
    monkeypatch.setattr(publish, "PART_BYTES", part_bytes)
    monkeypatch.setattr(Publisher, "_score", lambda self, sequences: ())
    model = torch.nn.Module()
    for name, shape in {"a": (25,), "b": (3, 7), "c": (16,), "d": (1,), "e": (50, 3)}.items():
        model.register_parameter(name, torch.nn.Parameter(torch.rand(shape)))
    policy = SimpleNamespace(adapters=None, model=model, device=torch.device("cpu"), vocabulary=10, context=None)
    manifest, buffer = Publisher(policy).pack(version=0, step=0, epoch=1)
    assert [tensor.offset for tensor in manifest.tensors] == [0, 128, 256, 320, 384]
    expected = np.zeros(384 + 640, np.uint8)
    for tensor, parameter in zip(manifest.tensors, model.parameters(), strict=True):
        view_of(expected, tensor)[...] = parameter.detach().numpy()
    assert np.array_equal(buffer, expected)


def test_ties_are_published_once(make_model):
    tied, untied = (Publisher(Policy(make_model(name))).tensors for name in ("qwen2", "qwen2-untied"))
    assert {t.name for t in untied} - {t.name for t in tied} == {"lm_head.weight"}


def test_the_bytes_follow_the_weights(make_model):
    model = make_model("qwen2")
    publisher = Publisher(Policy(model), probe_every=2)
    first, buffer = publisher.pack(version=0, step=0, epoch=1)
    with torch.no_grad():
        model.model.norm.weight.add_(1.0)
    second, again = publisher.pack(version=1, step=1, epoch=1)
    assert first.digest == digest_of(buffer) != second.digest == digest_of(again)
    norm = next(t for t in second.tensors if t.name == "model.norm.weight")
    np.testing.assert_array_equal(view_of(again, norm), model.model.norm.weight.detach().numpy())
    third, _ = publisher.pack(version=2, step=2, epoch=1)
    assert [bool(m.probes) for m in (first, second, third)] == [True, False, True]
    assert third.digest == second.digest


def test_probes_notice_every_single_tensor(make_model):
    """Whatever tensor a receiver holds stale, some probe is off by more than the tolerance."""
    model = make_model("qwen2-untied")
    policy = Policy(model)
    manifest, _ = Publisher(policy).pack(version=0, step=0, epoch=1)
    for name, parameter in model.named_parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        gap = max(np.abs(policy.score(p.tokens_T) - p.logprob_T).max() for p in manifest.probes)
        # A bias of all keys moves no softmax: no engine could be told from another by it.
        assert gap > manifest.tolerance or name.endswith("k_proj.bias"), name
        with torch.no_grad():
            parameter.copy_(kept)


def test_bfloat16_is_half_the_bytes_and_rounds_the_same_way(make_model):
    model = make_model("qwen2")
    wide = Publisher(Policy(model)).pack(version=0, step=0, epoch=1)
    narrow = Publisher(Policy(model), dtype="bfloat16").pack(version=0, step=0, epoch=1)
    assert narrow[1].size < 0.6 * wide[1].size
    assert narrow[0].tolerance > wide[0].tolerance
    tensor = narrow[0].tensors[0]
    bits = torch.from_numpy(view_of(narrow[1], tensor).copy()).view(torch.bfloat16)
    assert torch.equal(bits, dict(model.named_parameters())[tensor.name].detach().to(torch.bfloat16))


def test_probe_sequences_are_fixed_and_fit_the_context():
    assert [t.tolist() for t in probe_sequences(50, 8)] == [t.tolist() for t in probe_sequences(50, 8)]
    assert all(len(tokens) == 8 and tokens.max() < 50 for tokens in probe_sequences(50, 8))


def test_half_precision_is_allowed_as_much_as_these_weights_round(make_model):
    """Large logits round by more: a fixed tolerance would end a worker that holds the very weights published."""
    model = make_model("qwen2-untied")
    sequences = probe_sequences(model.config.vocab_size, None)

    def gap_and_tolerance() -> tuple[float, float]:
        manifest, _ = Publisher(Policy(model), dtype="bfloat16").pack(version=0, step=0, epoch=1)
        engine = Policy(copy.deepcopy(model).to(torch.bfloat16))  # every operation and every weight rounded
        pairs = zip(sequences, manifest.probes, strict=True)
        return max(np.abs(engine.score(tokens) - probe.logprob_T).max() for tokens, probe in pairs), manifest.tolerance

    gap, tolerance = gap_and_tolerance()
    assert gap < tolerance
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    gap, tolerance = gap_and_tolerance()
    assert 0.1 < gap < tolerance


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_of_adapters_the_factors_alone_are_published(name, make_model, tmp_path):
    """A receiver that has the base adds the scaled products, and computes what the learner does."""
    model, base = make_model(name), make_model(name)
    policy = Policy(model, adapters=Adapters(model, LoraConfig(rank=2, alpha=3), name="base", seed=0))
    publisher = Publisher(policy, dtype="bfloat16", probe_every=1)
    first, buffer = publisher.pack(version=0, step=0, epoch=1)
    whole = sum(p.numel() for p in base.parameters()) * 4
    assert buffer.size < whole / 3
    assert {tensor.dtype for tensor in first.tensors} == {"float32"}, "half precision would round twice"
    assert first.adapter.dtype == "bfloat16" and first.adapter.scale == 1.5
    assert first.adapter.base == identity_of((n, p.detach().numpy()) for n, p in base.named_parameters())
    with torch.no_grad():
        for _, factor in policy.adapters.factors():
            factor.add_(torch.linspace(-0.2, 0.2, factor.numel()).view(factor.shape))
    second, again = publisher.pack(version=1, step=1, epoch=1)
    assert first.digest != second.digest
    held = views(write(tmp_path, second, again))
    parameters = dict(base.named_parameters())
    with torch.no_grad():
        for weight, (b, a) in factors_of(second.tensors).items():
            parameters[weight].add_(second.adapter.scale * torch.from_numpy(held[b.name] @ held[a.name]))
    for probe in second.probes:
        assert np.abs(Policy(base).score(probe.tokens_T) - probe.logprob_T).max() < 1e-5
    moved = max(np.abs(a.logprob_T - b.logprob_T).max() for a, b in zip(first.probes, second.probes, strict=True))
    assert moved > 0.1


def test_merged_weights_in_half_precision_stay_within_the_tolerance(make_model):
    """They are rounded after the sum; the tolerance is measured where base and adapters are rounded apart."""
    model = make_model("qwen2-untied")
    policy = Policy(model, adapters=Adapters(model, LoraConfig(rank=2, alpha=4), name="base", seed=0))
    with torch.no_grad():
        for _, factor in policy.adapters.factors():
            factor.add_(torch.linspace(-0.3, 0.3, factor.numel()).view(factor.shape))
    manifest, _ = Publisher(policy, dtype="bfloat16").pack(version=0, step=0, epoch=1)
    engine = make_model("qwen2-untied")
    engine.load_state_dict(dict(policy.weights()))
    engine = Policy(engine.to(torch.bfloat16))
    gap = max(np.abs(engine.score(probe.tokens_T) - probe.logprob_T).max() for probe in manifest.probes)
    assert 1e-3 < gap < manifest.tolerance
