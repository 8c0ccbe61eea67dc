"""Loading, the proof of packing, and the words of a micro-batch."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, MambaConfig, PreTrainedModel, Qwen2ForCausalLM

from millrace.core.errors import ModelError, TrainingError
from millrace.learner import model as model_module
from millrace.learner.assemble import Sample, pack
from millrace.learner.model import Policy, head_of, load_model, prove_packing
from millrace.learner.table_model import TableConfig, TableForCausalLM
from millrace.learner.tokenizer import load_tokenizer

VOCABULARY = 61


def micro_of(*shapes: tuple[int, tuple[int, ...]]):
    rng = np.random.default_rng(0)
    samples = [
        Sample(
            group=group,
            prompt_P=prompt_P,
            token_T=rng.integers(VOCABULARY, size=length, dtype=np.int32),
            behaviour_logprob_T=-rng.random(length, dtype=np.float32),
            lag_T=np.full(length, group, np.int32),
            place_N=np.arange(length),
            weight_N=np.ones(length, np.float32),
        )
        for group, (prompt, lengths) in enumerate(shapes)
        for prompt_P in [rng.integers(VOCABULARY, size=prompt, dtype=np.int32)]
        for length in lengths
    ]
    return pack(samples)


def test_words_carry_the_policy_the_reference_and_the_data(make_model):
    policy = Policy(make_model("qwen2"), reference=make_model("qwen2", seed=1), temperature=0.7)
    micro = micro_of((3, (4, 2)), (5, (3,)))
    have = policy.words(micro, {"logprob_N", "reference_logprob_N"})
    assert policy.models == {"reference"}
    assert have["logprob_N"].requires_grad and have["entropy_N"].requires_grad
    assert not have["reference_logprob_N"].requires_grad and not have["proximal_logprob_N"].requires_grad
    assert torch.equal(have["logprob_N"], have["proximal_logprob_N"])
    assert have["staleness_N"].tolist() == [0] * 6 + [1] * 3
    other = Policy(make_model("qwen2", seed=1), temperature=0.7).words(micro)
    assert "reference_logprob_N" not in other
    torch.testing.assert_close(have["reference_logprob_N"], other["logprob_N"].detach())
    assert (have["reference_logprob_N"] - have["proximal_logprob_N"]).abs().max() > 0.1
    assert all(not p.requires_grad for p in policy.reference.parameters())


def test_log_probabilities_are_those_of_the_sampling_temperature(make_model):
    model = make_model("qwen2")
    micro = micro_of((4, (3,)))
    hot = Policy(model, temperature=2.0).words(micro)["proximal_logprob_N"]
    row = torch.from_numpy(np.concatenate([micro.token_C, micro.token_N[-1:]]))
    model.set_attn_implementation("sdpa")
    logits = model(row[None], use_cache=False).logits[0, 3:6]
    expected = torch.log_softmax(logits / 2.0, -1).gather(1, row[4:, None])[:, 0]
    torch.testing.assert_close(hot, expected.detach(), atol=1e-5, rtol=0)


def test_a_sequence_beyond_the_context_is_refused(make_model):
    with pytest.raises(TrainingError, match="a sequence of 259 tokens .* exceeds the model's context of 256"):
        Policy(make_model("qwen2")).words(micro_of((200, (60,))))


def test_score_is_plain_log_probabilities(make_model):
    model = make_model("llama")
    tokens = np.arange(3, 40, dtype=np.int32)
    ours = Policy(model, temperature=0.5).score(tokens)
    model.set_attn_implementation("sdpa")
    row = torch.from_numpy(tokens.astype(np.int64))
    logits = model(row[None], use_cache=False).logits[0, :-1]
    np.testing.assert_allclose(ours, torch.log_softmax(logits, -1).gather(1, row[1:, None])[:, 0].detach(), atol=1e-5)


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "gemma3"])
def test_a_saved_model_loads_in_float32_with_every_weight(name, make_model, model_dir):
    original = make_model(name)
    loaded = load_model(model_dir(original.to(torch.bfloat16)), device=torch.device("cpu"))
    assert {p.dtype for p in loaded.parameters()} == {torch.float32} and not loaded.training
    for (name_a, a), (name_b, b) in zip(original.named_parameters(), loaded.named_parameters(), strict=True):
        assert name_a == name_b and torch.equal(a.float(), b)


def test_a_table_goes_the_same_way(tmp_path, model_dir):
    table = TableForCausalLM(TableConfig(vocab_size=VOCABULARY, positions=4, eos_token_id=2))
    with torch.no_grad():
        table.table.normal_()
    loaded = load_model(model_dir(table), device=torch.device("cpu"))
    assert isinstance(loaded, TableForCausalLM) and loaded.config.eos_token_id == 2
    micro = micro_of((3, (4, 2)))
    have = Policy(loaded).words(micro)
    rows = loaded.table[micro.token_C[micro.row_N], np.minimum(micro.position_C[micro.row_N], 3)]
    expected = torch.log_softmax(rows, -1)[torch.arange(6), micro.token_N]
    torch.testing.assert_close(have["logprob_N"], expected)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (config["model_type"], config["vocab_size"], config["positions"]) == ("millrace_table", VOCABULARY, 4)
    assert "millrace_packed" not in json.dumps(config)


class Leaking(Qwen2ForCausalLM):
    """Its rows see their neighbours, as those of a convolution or a recurrence do."""

    def __init__(self, config):
        super().__init__(config)
        self.model.layers[0].register_forward_pre_hook(
            lambda module, args, kwargs: ((args[0] + args[0].roll(1, 1),), kwargs), with_kwargs=True
        )


class Scaled(Qwen2ForCausalLM):
    """Its logits are scaled outside the head."""

    def forward(self, *args, **kwargs):
        outcome = super().forward(*args, **kwargs)
        outcome.logits = outcome.logits * 0.5
        return outcome


@pytest.mark.parametrize("kind", [Leaking, Scaled])
def test_the_proof_finds_leaks_and_unknown_heads(kind, make_model):
    honest = make_model("qwen2")
    prove_packing(honest)
    broken = kind._from_config(honest.config, attn_implementation="millrace_packed").eval()
    broken.load_state_dict(honest.state_dict())
    with pytest.raises(ModelError, match=r"'qwen2' is not supported: its log-probabilities of packed .* use a decoder"):
        prove_packing(broken)


def test_a_window_that_the_attention_function_is_not_told_of_is_refused(make_model):
    model = make_model("gemma3")
    prove_packing(model)
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None
    with pytest.raises(ModelError, match="slides its attention window without telling"):
        prove_packing(model)


def test_heads_of_known_kinds(make_model):
    assert head_of(make_model("gemma3")).softcap == 5.0
    model = make_model("qwen2")
    model.config.logit_scale, model.config.logits_scaling = 3.0, 2.0
    assert head_of(model).scale == 1.5
    assert head_of(TableForCausalLM(TableConfig())) is None


def save(model: PreTrainedModel, path: Path) -> str:
    model.save_pretrained(path)
    return str(path)


def test_what_is_wrong_with_a_model_directory_is_said(tmp_path, make_model, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match=r"model ./nowhere: no such directory; give one with config.json"):
        load_model("./nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="the directory has no config.json"):
        load_model(str(tmp_path / "empty"))
    bare = save(make_model("qwen2"), tmp_path / "bare")
    with pytest.raises(ModelError, match="has no tokenizer; save one beside it with"):
        load_tokenizer(bare)
    (tmp_path / "bare" / "config.json").write_text('{"model_type": "oddformer"}')
    with pytest.raises(ModelError, match="oddformer"):
        load_model(bare)
    mamba = AutoModelForCausalLM.from_config(
        MambaConfig(vocab_size=31, hidden_size=16, num_hidden_layers=1, state_size=4)
    )
    with pytest.raises(ModelError, match="'mamba' is not supported"):
        load_model(save(mamba, tmp_path / "mamba"))


def test_missing_weights_do_not_start_from_random_numbers(tmp_path, make_model):
    model = make_model("qwen2-untied")
    path = tmp_path / "part"
    model.save_pretrained(path, state_dict={k: v for k, v in model.state_dict().items() if k != "lm_head.weight"})
    with pytest.raises(ModelError, match="its files lack 1 weights .lm_head.weight"):
        load_model(str(path))


def test_a_tokenizer_that_cannot_end_an_answer_is_refused(tmp_path, make_model, tokenizer):
    path = save(make_model("qwen2"), tmp_path / "endless")
    tokenizer.save_pretrained(path)
    config = Path(path) / "tokenizer_config.json"
    data = json.loads(config.read_text())
    data.pop("eos_token")
    config.write_text(json.dumps(data))
    with pytest.raises(ModelError, match="no eos_token among the model's 61 tokens .* so no answer could ever end"):
        load_tokenizer(path)


def test_bfloat16_products_keep_float32_masters(make_model):
    model = make_model("qwen2")
    exact = Policy(model).words(micro_of((3, (4, 2))))["logprob_N"].detach()
    have = Policy(model, compute_dtype=torch.bfloat16).words(micro_of((3, (4, 2))))
    have["logprob_N"].sum().backward()
    assert 1e-6 < (have["logprob_N"] - exact).abs().max() < 0.2
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_the_context_is_the_models(make_model):
    assert Policy(make_model("gpt2")).context == 256
    assert model_module.device_of("cpu") == torch.device("cpu")
