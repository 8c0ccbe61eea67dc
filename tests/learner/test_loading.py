"""What a configuration trains: checkpointing and half precision change memory and speed, not what is learnt."""

import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from millrace.core.errors import ModelError
from millrace.learner.assemble import Sample, pack
from millrace.learner.config import LearnerConfig, LoraConfig
from millrace.learner.loading import checkpoint_blocks, load_policy
from millrace.learner.model import Policy, load_model
from millrace.learner.optimiser import Optimiser
from millrace.learner.table_model import TableConfig, TableForCausalLM

ARCHITECTURES = ["qwen2", "qwen3", "llama", "gemma3", "gpt2"]
LORA = LoraConfig(rank=4, alpha=8)


def micro_of(*shapes: tuple[int, tuple[int, ...]]):
    rng = np.random.default_rng(0)
    return pack(
        [
            Sample(
                group=group,
                prompt_P=prompt_P,
                token_T=rng.integers(61, size=length, dtype=np.int32),
                behaviour_logprob_T=-rng.random(length, dtype=np.float32),
                lag_T=np.zeros(length, np.int32),
                place_N=np.arange(length),
                weight_N=np.ones(length, np.float32),
            )
            for group, (prompt, lengths) in enumerate(shapes)
            for prompt_P in [rng.integers(61, size=prompt, dtype=np.int32)]
            for length in lengths
        ]
    )


MICRO = micro_of((3, (4, 2)), (5, (3, 6, 1)), (9, (12, 30)))


def loss_of(policy: Policy) -> torch.Tensor:
    have = policy.words(MICRO)
    sign_N = torch.linspace(-1, 1, len(have["logprob_N"]))
    return (sign_N * have["logprob_N"]).sum() + 0.1 * have["entropy_N"].sum()


def gradients_of(policy: Policy) -> dict[str, torch.Tensor]:
    policy.model.zero_grad(set_to_none=True)
    loss_of(policy).backward()
    return {name: p.grad for name, p in policy.model.named_parameters() if p.grad is not None}


def opened(directory: str, **config) -> Policy:
    policy = load_policy(directory, LearnerConfig(device="cpu", **config))
    if policy.adapters is not None:
        with torch.no_grad():
            for _, factor in policy.adapters.factors():
                factor.add_(torch.linspace(-0.05, 0.05, factor.numel()).view(factor.shape))
    return policy


class Live(TorchDispatchMode):
    """Bytes of tensors that live at once, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outcome = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(outcome):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return outcome

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen or not self._seen[key].alive:
            self.now += size
            self.peak = max(self.peak, self.now)
            self._seen[key] = weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradient_checkpointing_gives_the_same_gradients(name, lora, make_model, model_dir):
    directory = model_dir(make_model(name))
    plain = gradients_of(opened(directory, lora=lora))
    again = gradients_of(opened(directory, lora=lora, gradient_checkpointing=True))
    assert plain.keys() == again.keys() and plain
    for parameter, gradient in plain.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(again[parameter], gradient, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_blocks_are_computed_once_more_and_draw_no_dropout(name, make_model, model_dir, monkeypatch):
    model = make_model(name)
    for rate in ("attention_dropout", "resid_pdrop", "attn_pdrop", "embd_pdrop"):
        if hasattr(model.config, rate):
            setattr(model.config, rate, 0.5)
    policy = opened(model_dir(model), gradient_checkpointing=True)
    blocks = policy.model.model.layers if name == "llama" else policy.model.transformer.h
    calls = []
    for block in blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    loss = loss_of(policy)
    assert len(calls) == 2
    loss.backward()
    assert len(calls) == 4
    assert loss_of(policy).item() == loss.item()


def test_blocks_that_draw_dropout_themselves_are_refused(make_model):
    model = make_model("llama")
    checkpoint_blocks(model)
    for block in model.model.layers:
        block.register_forward_hook(lambda module, _, out: torch.nn.functional.dropout(out, 0.3, module.training))
    with pytest.raises(ModelError, match="'llama' computes differently with gradient checkpointing"):
        checkpoint_blocks(model)


def test_gradient_checkpointing_takes_less_memory(make_model, model_dir):
    """Peak of what is alive beside the weights, forward and backward."""
    config = make_model("llama").config
    config.num_hidden_layers, config.hidden_size, config.intermediate_size = 8, 64, 256
    torch.manual_seed(0)
    directory = model_dir(type(make_model("llama"))(config))
    micro = micro_of((20, (60,) * 8))
    peaks = []
    for checkpointing in (False, True):
        policy = opened(directory, lora=LORA, gradient_checkpointing=checkpointing)
        with Live() as live:
            policy.words(micro)["logprob_N"].sum().backward()
        peaks.append(live.peak)
    assert peaks[1] < 0.4 * peaks[0]


def test_what_has_no_blocks_is_refused(model_dir):
    table = model_dir(TableForCausalLM(TableConfig(vocab_size=61, positions=4)), "table")
    with pytest.raises(ModelError, match="'millrace_table' has no blocks that transformers can checkpoint; set grad"):
        load_policy(table, LearnerConfig(gradient_checkpointing=True, device="cpu"))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_bfloat16_products_stay_near_float32(name, lora, checkpointing, make_model, model_dir):
    directory = model_dir(make_model(name))
    exact = opened(directory, lora=lora)
    half = opened(directory, lora=lora, compute_dtype="bfloat16", gradient_checkpointing=checkpointing)
    a, b = exact.words(MICRO), half.words(MICRO)
    assert b["logprob_N"].dtype == b["entropy_N"].dtype == torch.float32
    gap = (a["logprob_N"] - b["logprob_N"]).abs().max()
    assert 1e-5 < gap < 0.15, "nats"
    expected, found = gradients_of(exact), gradients_of(half)
    assert expected.keys() == found.keys() and {g.dtype for g in found.values()} == {torch.float32}
    whole, other = (torch.cat([g.flatten() for g in gs.values()]) for gs in (expected, found))
    assert torch.cosine_similarity(whole, other, dim=0) > 0.99
    assert 0.95 < other.norm() / whole.norm() < 1.05


def test_weights_and_moments_stay_in_float32(make_model, model_dir):
    directory = model_dir(make_model("qwen2"))
    policy = opened(directory, lora=LORA, compute_dtype="bfloat16", gradient_checkpointing=True)
    optimiser = Optimiser(policy.model.named_parameters(), LearnerConfig(learning_rate=1e-3))
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    losses = []
    for _ in range(8):
        loss = -policy.words(MICRO)["logprob_N"].mean()
        loss.backward()
        optimiser.step(where=str)
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert {p.dtype for p in policy.model.parameters()} == {torch.float32}
    assert {t.dtype for name, t in optimiser.state().items() if name != "steps"} == {torch.float32}
    moved = {name for name, p in policy.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(optimiser.names)


def test_a_policy_without_either_is_the_model_as_it_was(make_model, model_dir, tmp_path: Path):
    policy = opened(model_dir(make_model("llama")))
    assert policy.adapters is None and policy.models == frozenset()
    assert all(p.requires_grad for p in policy.model.parameters())


def test_threads_that_load_at_once_get_whole_models(make_model, model_dir):
    """transformers alone loses tied weights then: each of these would lack its head."""
    directory = model_dir(make_model("llama"))
    expected = load_model(directory, device=torch.device("cpu")).state_dict()

    def load(_: int) -> dict[str, torch.Tensor]:
        return load_model(directory, device=torch.device("cpu")).state_dict()

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(load, range(8)):
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
