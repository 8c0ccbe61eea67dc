"""Adapters: the same model to the bit at first, gradients in closed form, opened by peft, resumed exactly."""

import json
import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from millrace.core.errors import ConfigError, TrainingError
from millrace.core.types import Prompt
from millrace.learner import checkpoint
from millrace.learner.assemble import Sample, pack
from millrace.learner.checkpoint import LearnerState
from millrace.learner.config import LearnerConfig, LoraConfig, OptimiserConfig, SupervisedConfig
from millrace.learner.loading import load_policy
from millrace.learner.lora import Adapters, AdaptersOff, check_targets
from millrace.learner.model import Policy, load_model
from millrace.learner.optimiser import Optimiser
from millrace.learner.reference import move
from millrace.learner.supervised import train_supervised
from millrace.learner.table_model import TableConfig, TableForCausalLM

ARCHITECTURES = ["qwen2", "qwen2-untied", "qwen3", "llama", "gemma3", "gpt2"]
LORA = LoraConfig(rank=3, alpha=6)
TOKENS = np.arange(3, 40, dtype=np.int32)
CPU = torch.device("cpu")


def adapted(model, config: LoraConfig = LORA, *, trained: bool = True) -> Adapters:
    """Adapters whose factors are all far from zero."""
    adapters = Adapters(model, config, name="base", seed=0)
    if trained:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for _, factor in adapters.factors():
                factor.copy_(torch.randn(factor.shape, generator=generator) * 0.1)
    return adapters


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


MICRO = micro_of((3, (4, 2)), (5, (3, 6, 1)))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_it_starts_as_the_base_and_differs_once_trained(name, make_model):
    model = make_model(name)
    plain = Policy(model).score(TOKENS)
    adapters = adapted(model, trained=False)
    assert np.array_equal(Policy(model, adapters=adapters).score(TOKENS), plain)
    with torch.no_grad():
        for _, factor in adapters.factors():
            factor.add_(0.1)
    assert np.abs(Policy(model, adapters=adapters).score(TOKENS) - plain).max() > 0.01
    with adapters.off():
        assert np.array_equal(Policy(model).score(TOKENS), plain)
    assert all(factor.requires_grad for _, factor in adapters.factors())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_merged_weights_compute_what_the_adapters_do(name, make_model):
    model = make_model(name)
    adapters = adapted(model)
    whole = make_model(name, seed=1)
    whole.load_state_dict(dict(adapters.whole()))
    ours = Policy(model, adapters=adapters).score(TOKENS)
    assert np.abs(Policy(whole).score(TOKENS) - ours).max() < 1e-5
    assert dict(adapters.whole()).keys() == whole.state_dict().keys()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_are_those_of_the_whole_weights_through_the_factors(name, make_model):
    """dL/dB = scale * G A', dL/dA = scale * B' G, with G the gradient of the merged weight."""
    model = make_model(name)
    adapters = adapted(model)
    whole = make_model(name, seed=1)
    whole.load_state_dict(dict(adapters.whole()))
    for policy in (Policy(model, adapters=adapters), Policy(whole)):
        policy.words(MICRO)["logprob_N"].sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        n for n, _ in model.named_parameters() if ".lora_" in n
    }, "nothing else is trained"
    gradients = {n: p.grad for n, p in whole.named_parameters()}
    factors = dict(adapters.factors())
    held = {n: p.grad for n, p in model.named_parameters()}
    for weight in {n.rpartition(".")[0] for n in factors}:
        b, a = factors[f"{weight}.lora_B"].detach(), factors[f"{weight}.lora_A"].detach()
        grad_b, grad_a = (
            adapters.scale * gradients[weight] @ a.T,
            adapters.scale * b.T @ gradients[weight],
        )
        if name == "gpt2":  # its weights are transposed, so peft's own factors swap places
            grad_b, grad_a = grad_a.T, grad_b.T
        layer = weight.removesuffix(".weight")
        for factor, expected in (("lora_B", grad_b), ("lora_A", grad_a)):
            torch.testing.assert_close(held[f"{layer}.{factor}.default.weight"], expected, rtol=1e-4, atol=1e-4)


def test_all_linear_layers_of_the_blocks_are_adapted_and_nothing_else(make_model):
    model = make_model("qwen2-untied")
    names = [name for name, _ in adapted(model).factors()]
    assert len(names) == 2 * 7 * 2
    assert not any("lm_head" in name or "embed" in name for name in names)
    only = adapted(make_model("llama"), LoraConfig(rank=2, targets=("q_proj", "v_proj")))
    assert {name.split(".")[-3] for name, _ in only.factors()} == {"q_proj", "v_proj"}


def test_unknown_targets_are_refused_with_the_nearest(make_model, model_dir):
    with pytest.raises(
        ConfigError,
        match=r"lora.targets: model type 'llama' has no linear layer 'q_porj' .*did you mean 'q_proj'.* It has",
    ):
        adapted(make_model("llama"), LoraConfig(targets=("v_proj", "q_porj")))
    directory = model_dir(make_model("gpt2"))
    check_targets(directory, LoraConfig(targets=("c_attn",)))
    with pytest.raises(ConfigError, match="no linear layer 'q_proj' in its blocks"):
        check_targets(directory, LoraConfig(targets=("q_proj",)))
    table = model_dir(TableForCausalLM(TableConfig(vocab_size=61, positions=4)), "table")
    with pytest.raises(ConfigError, match="'millrace_table' has no linear layers in numbered blocks; train it without"):
        check_targets(table, LoraConfig())


def test_the_identity_is_of_the_base_alone(make_model):
    first, again, other = make_model("llama"), make_model("llama"), make_model("llama", seed=1)
    base = adapted(first).base
    assert adapted(again, LoraConfig(rank=2), trained=False).base == base != adapted(other).base


def test_the_seed_makes_the_first_factors_and_leaves_other_random_numbers_alone(make_model):
    torch.manual_seed(3)
    expected = torch.rand(2)
    made = []
    for seed in (0, 0, 1):
        model = make_model("llama")
        torch.manual_seed(3)
        made.append(dict(Adapters(model, LORA, name="base", seed=seed).factors()))
        assert torch.equal(torch.rand(2), expected)
    name = "model.layers.0.self_attn.q_proj.weight.lora_A"
    assert torch.equal(made[0][name], made[1][name]) and not torch.equal(made[0][name], made[2][name])


def test_the_reference_is_the_policy_without_its_adapters_at_no_memory(make_model, model_dir):
    directory = model_dir(make_model("qwen2"))
    shutil.copytree(directory, Path(directory).parent / "copy")
    config = LearnerConfig(lora=LORA, device="cpu")
    off = load_policy(directory, config, reference=f"{directory}/../model")
    own = load_policy(directory, config, reference=str(Path(directory).parent / "copy"))
    assert off.models == own.models == {"reference"}
    assert isinstance(off.reference, AdaptersOff) and not isinstance(own.reference, AdaptersOff)
    moving = load_policy(directory, config, reference=directory, reference_moves=True)
    assert not isinstance(moving.reference, AdaptersOff), "it will need weights of its own"
    found = []
    for policy in (off, own):
        with torch.no_grad():
            for _, factor in policy.adapters.factors():
                factor.add_(0.05)
        have = policy.words(MICRO, {"logprob_N", "reference_logprob_N"})
        (have["logprob_N"] - have["reference_logprob_N"]).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.requires_grad])
        found.append((have["reference_logprob_N"], gradient))
        assert (have["reference_logprob_N"] - have["logprob_N"]).abs().max() > 0.01
        assert not have["reference_logprob_N"].requires_grad
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_a_reference_that_moves_goes_to_the_merged_weights(make_model):
    model = make_model("gpt2")
    policy = Policy(model, adapters=adapted(model), reference=make_model("gpt2"))
    began = {name: p.clone() for name, p in policy.reference.named_parameters()}
    move(policy.reference, policy, 0.25)
    whole = dict(policy.weights())
    for name, parameter in policy.reference.named_parameters():
        torch.testing.assert_close(parameter, 0.75 * began[name] + 0.25 * whole[name])
    move(policy.reference, policy, 1.0)
    assert np.abs(Policy(policy.reference).score(TOKENS) - policy.score(TOKENS)).max() < 1e-5


def train(policy: Policy, optimiser: Optimiser, steps: int) -> None:
    for _ in range(steps):
        (-policy.words(MICRO)["logprob_N"].mean()).backward()
        optimiser.step(where=str)


def start(name: str, make_model) -> tuple[Policy, Optimiser]:
    model = make_model(name)
    adapters = Adapters(model, LORA, name="base", seed=0)
    return Policy(model, adapters=adapters), Optimiser(model.named_parameters(), OptimiserConfig(learning_rate=0.01))


def saved(policy: Policy, optimiser: Optimiser, root: Path, tokenizer=None) -> checkpoint.Saved:
    state = LearnerState(step=2, version=3, epoch=1, seed=0)
    return checkpoint.save(str(root), state, policy=policy, tokenizer=tokenizer, optimiser=optimiser)


@pytest.mark.parametrize("name", ["qwen2", "qwen2-untied", "gpt2"])
def test_a_learner_resumed_from_it_goes_on_to_the_bit(name, make_model, tmp_path):
    policy, optimiser = start(name, make_model)
    assert all(".lora_" in parameter for parameter in optimiser.names)
    train(policy, optimiser, 2)
    found = saved(policy, optimiser, tmp_path)
    again, resumed = start(name, make_model)
    state = checkpoint.load(found.directory, found.digest, policy=again, optimiser=resumed)
    assert state.base == policy.adapters.base
    for pair in ((policy, optimiser), (again, resumed)):
        train(*pair, 2)
    before = dict(make_model(name).named_parameters())
    for (parameter, a), (_, b) in zip(policy.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(a, b), parameter
        if ".lora_" not in parameter:
            assert torch.equal(a, before[parameter.replace(".base_layer.", ".")]), "the base is never touched"


@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_a_checkpoint_opens_whole_and_as_an_adapter_of_its_base(name, make_model, model_dir, tmp_path, tokenizer):
    base = model_dir(make_model(name), "base")
    policy, optimiser = start(name, make_model)
    train(policy, optimiser, 3)
    directory = Path(saved(policy, optimiser, tmp_path / "checkpoints", tokenizer).directory)
    assert sorted(p.name for p in directory.glob("*.safetensors")) == ["model.safetensors"]
    assert sorted(p.name for p in (directory / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    expected = policy.score(TOKENS)
    assert np.abs(Policy(load_model(str(directory), device=CPU)).score(TOKENS) - expected).max() < 1e-5
    row = torch.from_numpy(TOKENS.astype(np.int64))[None]
    opened = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), directory / "adapter")
    logits = opened(row, use_cache=False).logits[0, :-1]
    theirs = torch.log_softmax(logits, -1).gather(1, row[0, 1:, None])[:, 0].detach().numpy()
    assert np.abs(theirs - expected).max() < 1e-5
    assert np.abs(expected - Policy(make_model(name)).score(TOKENS)).max() > 0.01, "it learnt something"
    config = json.loads((directory / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["inference_mode"]) == (3, 6, True)


def test_a_checkpoint_of_other_settings_is_refused(make_model, tmp_path):
    policy, optimiser = start("llama", make_model)
    train(policy, optimiser, 1)
    found = saved(policy, optimiser, tmp_path)

    def resume(model, config: LoraConfig | None) -> None:
        adapters = None if config is None else Adapters(model, config, name="base", seed=0)
        new = Optimiser(model.named_parameters(), optimiser.config)
        checkpoint.load(found.directory, found.digest, policy=Policy(model, adapters=adapters), optimiser=new)

    resume(make_model("llama"), LORA)
    with pytest.raises(TrainingError, match="adapters of a base model with weights .* its files have changed"):
        resume(make_model("llama", seed=1), LORA)
    for config in (LoraConfig(rank=2, alpha=4), LoraConfig(rank=3, alpha=6, targets=("q_proj",))):
        with pytest.raises(TrainingError, match="has other adapters, such as .* resume with the lora settings"):
            resume(make_model("llama"), config)
    with pytest.raises(TrainingError, match="has lora.alpha = 6, the run 12"):
        resume(make_model("llama"), LoraConfig(rank=3, alpha=12))
    with pytest.raises(TrainingError, match="was written with lora; resume with the settings"):
        resume(make_model("llama"), None)


def test_a_checkpoint_without_lora_is_not_resumed_with_it(make_model, tmp_path):
    model = make_model("llama")
    optimiser = Optimiser(model.named_parameters(), OptimiserConfig(learning_rate=0.01))
    state = LearnerState(step=1, version=1, epoch=1, seed=0)
    found = checkpoint.save(str(tmp_path), state, policy=Policy(model), tokenizer=None, optimiser=optimiser)
    policy, new = start("llama", make_model)
    with pytest.raises(TrainingError, match="was written without lora"):
        checkpoint.load(found.directory, found.digest, policy=policy, optimiser=new)


def test_a_reference_that_moved_comes_back(make_model, tmp_path):
    model, reference = make_model("llama"), make_model("llama", seed=2)
    optimiser = Optimiser(model.named_parameters(), OptimiserConfig(learning_rate=0.01))
    state = LearnerState(step=1, version=1, epoch=1, seed=0)
    moving = Policy(model, reference=reference, reference_moves=True)
    found = checkpoint.save(str(tmp_path), state, policy=moving, tokenizer=None, optimiser=optimiser)
    again = Policy(model, reference=make_model("llama"), reference_moves=True)
    checkpoint.load(found.directory, found.digest, policy=again, optimiser=optimiser)
    for a, b in zip(again.reference.parameters(), reference.parameters(), strict=True):
        assert torch.equal(a, b)
    still = Policy(model, reference=reference)
    found = checkpoint.save(str(tmp_path / "still"), state, policy=still, tokenizer=None, optimiser=optimiser)
    with pytest.raises(TrainingError, match="holds no reference model, which the run's recipe moves"):
        checkpoint.load(found.directory, found.digest, policy=again, optimiser=optimiser)


def test_supervised_training_learns_with_adapters_alone(make_model, model_dir, tmp_path, tokenizer):
    rows = [
        Prompt(id=f"rows:{i}", text=p, tokens_P=np.array(tokenizer(p)["input_ids"], np.int32), answer=a)
        for i, (p, a) in enumerate([("ab", "ba"), ("c", "cccc"), ("bca", "cab"), ("aa", "b")])
    ]
    config = SupervisedConfig(
        learning_rate=0.01, epochs=80, batch_rows=4, threads=1, device="cpu", lora=LoraConfig(rank=8)
    )
    directory = model_dir(make_model("qwen2"))
    result = train_supervised(directory, rows, str(tmp_path / "out"), config)
    assert result.last_loss < 1.6 < 3 < result.first_loss, "the head is frozen and too small for less"
    learnt = np.concatenate([rows[0].tokens_P, [4, 3, 2]]).astype(np.int32)
    assert Policy(load_model(result.directory, device=CPU)).score(learnt)[-3:].min() > -2
    before, after = (dict(load_model(d, device=CPU).named_parameters()) for d in (directory, result.directory))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.split(".")[-2].endswith("_proj") and name.endswith("weight")}
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
