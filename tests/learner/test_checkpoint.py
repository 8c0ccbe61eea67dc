"""Checkpoints: complete under their name, verified when read, opened by anybody, and exact."""

import errno
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from millrace.core.errors import CheckpointError, DiskFullError, TrainingError
from millrace.core.failpoint import arm
from millrace.learner.checkpoint import LearnerState, load, plain, save, verify
from millrace.learner.config import OptimiserConfig
from millrace.learner.model import Policy
from millrace.learner.optimiser import Optimiser
from tests.learner.conftest import config_of


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


def test_a_checkpoint_that_a_crash_cuts_has_another_name(tmp_path, make_model):
    model = make_model("qwen2")
    optimiser = trained(model)

    class Killed(BaseException):
        pass

    def kill(name: str) -> None:
        raise Killed(name)

    arm(kill)
    try:
        with pytest.raises(Killed, match=r"learner\.checkpoint\.write"):
            save(str(tmp_path), state(), policy=Policy(model), tokenizer=None, optimiser=optimiser)
    finally:
        arm(None)
    assert [path.name for path in tmp_path.iterdir()] == ["step_1.2.partial"]
    checkpoint = save(str(tmp_path), state(), policy=Policy(model), tokenizer=None, optimiser=optimiser)
    verify(checkpoint.directory, checkpoint.digest)
    assert [path.name for path in tmp_path.iterdir()] == ["step_1.2"]


def full(how: str, monkeypatch) -> None:
    """Make a disk that is full: known before, while safetensors writes, while we write."""

    def no_room(*args, **kwargs):
        if how == "safetensors":
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        raise OSError(errno.ENOSPC, "No space left on device")

    match how:
        case "before":
            usage = shutil.disk_usage("/")._replace(free=1000)
            monkeypatch.setattr("millrace.learner.checkpoint.shutil.disk_usage", lambda path: usage)
        case "safetensors":
            monkeypatch.setattr("millrace.learner.checkpoint.save_file", no_room)
        case "json":
            monkeypatch.setattr("millrace.learner.checkpoint._write_json", no_room)


@pytest.mark.parametrize("how", ["before", "safetensors", "json"])
def test_a_full_disk_leaves_nothing_of_it_and_says_how_much_is_needed(tmp_path, make_model, monkeypatch, how):
    model = make_model("qwen2")
    optimiser = trained(model)
    good = save(str(tmp_path), state(), policy=Policy(model), tokenizer=None, optimiser=optimiser)
    full(how, monkeypatch)
    with pytest.raises(DiskFullError) as caught:
        save(str(tmp_path), state(2), policy=Policy(model), tokenizer=None, optimiser=optimiser)
    monkeypatch.undo()
    needed = 3 * sum(p.nbytes for p in model.parameters()) + 2**20
    assert re.search(rf"step_2\.2 cannot be written: it needs {needed:,} bytes, and [\d,]+ are free", str(caught.value))
    assert [path.name for path in tmp_path.iterdir()] == ["step_1.2"]
    verify(good.directory, good.digest)
    written = sum(path.stat().st_size for path in Path(good.directory).rglob("*") if path.is_file())
    assert written <= needed, "what it says it needs is enough"


def test_a_directory_that_cannot_be_written_is_no_full_disk(tmp_path, make_model):
    model = make_model("qwen2")
    (tmp_path / "root").write_text("a file")
    with pytest.raises(CheckpointError, match="cannot be written: .*make its directory writable") as caught:
        save(str(tmp_path / "root"), state(), policy=Policy(model), tokenizer=None, optimiser=trained(model))
    assert not isinstance(caught.value, DiskFullError)


def test_a_memory_comes_back_in_its_order(tmp_path, make_model):
    """Which may be part of it: what was seen last comes last."""
    model, other = make_model("qwen2"), make_model("qwen2")
    memory = {"shaping": {"filters.0": {"streaks": {"b": 1, "c": 2, "a": 1}}}}
    policy, optimiser = Policy(model), trained(model)
    done = save(str(tmp_path), state(memory=memory), policy=policy, tokenizer=None, optimiser=optimiser)
    found = load(done.directory, done.digest, policy=Policy(other), optimiser=trained(other))
    assert list(found.memory["shaping"]["filters.0"]["streaks"]) == ["b", "c", "a"]


@pytest.mark.parametrize(
    ("memory", "why"), [({"x": {1}}, "Object of type set"), ({"x": [{1: 2}]}, "the key 1 is no string")]
)
def test_a_memory_that_json_cannot_hold_is_named(memory, why):
    with pytest.raises(TrainingError, match=f"memory of x cannot be saved: {why}.*must be of plain numbers"):
        plain(memory)


def test_a_memory_is_as_it_will_come_back():
    """Numbers of NumPy would go on as others than they are read: in another precision, against arrays."""
    found = plain({"x": {"mean": np.float64(0.1), "seen": (1, 2)}})
    assert type(found["x"]["mean"]) is float and found == {"x": {"mean": 0.1, "seen": [1, 2]}}


def test_another_model_is_refused(saved, make_model):
    checkpoint, _ = saved
    model = make_model("qwen2-untied")
    with pytest.raises(TrainingError, match="does not fit the model: .* such as lm_head.weight"):
        load(checkpoint.directory, checkpoint.digest, policy=Policy(model), optimiser=trained(model))


@pytest.mark.parametrize("other", ["gpt2", "qwen3", "wide"])
def test_a_model_of_another_size_or_kind_is_refused_and_is_no_damage(saved, make_model, other):
    checkpoint, _ = saved
    if other == "wide":
        config = config_of("qwen2")
        config.hidden_size = 64
        model = AutoModelForCausalLM.from_config(config)
    else:
        model = make_model(other)
    with pytest.raises(TrainingError, match=r"step_1\.2 does not fit the model") as caught:
        load(checkpoint.directory, checkpoint.digest, policy=Policy(model), optimiser=trained(model))
    assert not isinstance(caught.value, CheckpointError)
    assert "resume with the model that the run was started with" in str(caught.value)
