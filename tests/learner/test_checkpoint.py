"""Checkpoints: complete under their name, verified when read, opened by anybody, and exact."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from millrace.core.errors import TrainingError
from millrace.learner.checkpoint import LearnerState, load, retain, save, surviving, verify
from millrace.learner.config import OptimiserConfig
from millrace.learner.model import Policy
from millrace.learner.optimiser import Optimiser


def trained(model, steps: int = 1) -> Optimiser:
    optimiser = Optimiser(model.named_parameters(), OptimiserConfig(learning_rate=0.01))
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.sin(torch.arange(parameter.numel(), dtype=torch.float32)).view_as(parameter)
        optimiser.step(where=str)
    return optimiser


def state(step: int = 1, **fields) -> LearnerState:
    return LearnerState(**{"step": step, "version": 4, "epoch": 2, "seed": 0, **fields})


@pytest.fixture
def saved(tmp_path, make_model, tokenizer):
    model = make_model("qwen2")
    optimiser = trained(model)
    memory = {"objective": {"advantage": {"mean": 0.25}}}
    return save(
        str(tmp_path), state(memory=memory), policy=Policy(model), tokenizer=tokenizer, optimiser=optimiser
    ), model


def test_automodel_autotokenizer_and_generation_config_open_the_directory(saved, tokenizer):
    checkpoint, model = saved
    opened = AutoModelForCausalLM.from_pretrained(checkpoint.directory)
    row = torch.arange(3, 12)[None]
    model.set_attn_implementation("sdpa")
    assert opened.config._attn_implementation == "sdpa"
    torch.testing.assert_close(opened(row).logits, model(row).logits)
    assert AutoTokenizer.from_pretrained(checkpoint.directory)("abc")["input_ids"] == tokenizer("abc")["input_ids"]
    assert GenerationConfig.from_pretrained(checkpoint.directory).eos_token_id == 2
    names = sorted(path.name for path in Path(checkpoint.directory).rglob("*"))
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in names), "no pickles"
    beside = [path.name for path in Path(checkpoint.directory).glob("*.safetensors")]
    assert beside == ["model.safetensors"], "vLLM would take any other for weights of the model"
    assert Path(checkpoint.directory).name == "step_1.2"


@pytest.mark.parametrize("name", ["qwen2", "qwen2-untied", "gpt2", "gemma3"])
def test_a_learner_resumed_from_it_goes_on_to_the_bit(name, tmp_path, make_model):
    model = make_model(name)
    optimiser = trained(model, 2)
    checkpoint = save(str(tmp_path), state(), policy=Policy(model), tokenizer=None, optimiser=optimiser)
    drawn = torch.rand(3)
    other = make_model(name, seed=5)
    resumed = Optimiser(other.named_parameters(), optimiser.config)
    identity = [id(p) for p in other.parameters()]
    assert load(checkpoint.directory, checkpoint.digest, policy=Policy(other), optimiser=resumed) == state()
    assert torch.equal(torch.rand(3), drawn), "random numbers go on where they were"
    assert [id(p) for p in other.parameters()] == identity, "the optimiser and the publisher hold these"
    for pair in ((model, optimiser), (other, resumed)):
        for parameter in pair[0].parameters():
            parameter.grad = torch.cos(torch.arange(parameter.numel(), dtype=torch.float32)).view_as(parameter)
        pair[1].step(where=str)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_memories_come_back(saved, make_model):
    checkpoint, _ = saved
    model = make_model("qwen2", seed=1)
    optimiser = Optimiser(model.named_parameters(), OptimiserConfig(learning_rate=0.01))
    found = load(checkpoint.directory, checkpoint.digest, policy=Policy(model), optimiser=optimiser)
    assert found.memory == {"objective": {"advantage": {"mean": 0.25}}}


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("model.safetensors", "flip", "model.safetensors is not what was written"),
        ("learner/optimiser.safetensors", "cut", "learner/optimiser.safetensors is not what was written"),
        ("learner/state.json", "remove", "learner/state.json is missing"),
        ("files.json", "flip", "files.json has digest"),
        ("files.json", "remove", "there is no files.json, so it is not complete"),
    ],
)
def test_damage_is_named_before_anything_is_loaded(saved, name, damage, message):
    checkpoint, _ = saved
    verify(checkpoint.directory, checkpoint.digest)
    path = Path(checkpoint.directory) / name
    data = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data if damage == "flip" else data[:-1])
    with pytest.raises(TrainingError, match=f"{message}.*resume from an earlier checkpoint"):
        verify(checkpoint.directory, checkpoint.digest)


def test_a_half_written_directory_has_another_name(tmp_path, make_model, monkeypatch):
    model = make_model("qwen2")
    optimiser = trained(model)

    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr("millrace.learner.checkpoint.save_file", full)
    with pytest.raises(OSError, match="no space"):
        save(str(tmp_path), state(), policy=Policy(model), tokenizer=None, optimiser=optimiser)
    assert [path.name for path in tmp_path.iterdir()] == ["step_1.2.partial"]
    monkeypatch.undo()
    checkpoint = save(str(tmp_path), state(), policy=Policy(model), tokenizer=None, optimiser=optimiser)
    verify(checkpoint.directory, checkpoint.digest)
    assert [path.name for path in tmp_path.iterdir()] == ["step_1.2"]


def test_a_memory_comes_back_in_its_order(tmp_path, make_model):
    """Which may be part of it: what was seen last comes last."""
    model, other = make_model("qwen2"), make_model("qwen2")
    memory = {"shaping": {"filters.0": {"streaks": {"b": 1, "c": 2, "a": 1}}}}
    policy, optimiser = Policy(model), trained(model)
    done = save(str(tmp_path), state(memory=memory), policy=policy, tokenizer=None, optimiser=optimiser)
    found = load(done.directory, done.digest, policy=Policy(other), optimiser=trained(other))
    assert list(found.memory["shaping"]["filters.0"]["streaks"]) == ["b", "c", "a"]


def test_a_memory_that_json_cannot_hold_is_named(tmp_path, make_model):
    model = make_model("qwen2")
    with pytest.raises(
        TrainingError, match="state.json cannot be saved: Object of type set .* must be of plain numbers"
    ):
        save(str(tmp_path), state(memory={"x": {1}}), policy=Policy(model), tokenizer=None, optimiser=trained(model))


def test_another_model_is_refused(saved, make_model):
    checkpoint, _ = saved
    model = make_model("qwen2-untied")
    with pytest.raises(TrainingError, match="does not fit the model: .* such as lm_head.weight"):
        load(checkpoint.directory, checkpoint.digest, policy=Policy(model), optimiser=trained(model))


def directories(root: Path, rewards: dict[str, float]) -> list[tuple[str, float]]:
    for name, reward in rewards.items():
        (root / name / "learner").mkdir(parents=True)
        (root / name / "learner" / "state.json").write_text(json.dumps({"reward": reward}))
    return [(str(root / name), reward) for name, reward in rewards.items()]


def test_the_last_n_and_the_best_stay(tmp_path):
    committed = directories(tmp_path, {"step_1.1": 0.2, "step_2.1": 0.9, "step_3.1": 0.1, "step_4.1": 0.3})
    (tmp_path / "step_9.1").mkdir()  # an orphan
    (tmp_path / "step_5.1.partial").mkdir()
    left = retain(str(tmp_path), committed, keep=1)
    assert [Path(path).name for path, _ in left] == ["step_2.1", "step_4.1"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_2.1", "step_4.1"]


def test_a_resumed_run_knows_the_checkpoints_before_it(tmp_path):
    directories(tmp_path, {"step_2.1": 0.5, "step_10.1": 0.1, "step_4.2": 0.3, "step_12.1": 0.9})
    (tmp_path / "step_3.1.partial").mkdir()
    found = surviving(str(tmp_path), str(tmp_path / "step_10.1"))
    assert [(Path(path).name, reward) for path, reward in found] == [
        ("step_2.1", 0.5),
        ("step_4.2", 0.3),
        ("step_10.1", 0.1),
    ]
