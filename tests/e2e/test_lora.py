"""Adapters through real Ray and real vLLM: what the engines merge is what the learner computes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples import tiny_model
from millrace.cluster import config, jobs

STEPS, GROUPS, SIZE = 12, 8, 4
REWARD = '''
"""A user's reward file: the share of sevens."""


def score(text):
    return text.count("7") / max(len(text), 1)
'''

pytestmark = [pytest.mark.ray, pytest.mark.long]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Mapping[str, Any], Path]:
    folder = tmp_path_factory.mktemp("lora")
    tiny_model.build(folder / "model")
    rows = [{"prompt": f"{a} and {b}: "} for a in range(8) for b in range(8)]
    for name, part in (("train", rows[:56]), ("held_out", rows[56:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    (folder / "sevens.py").write_text(REWARD)
    (folder / "run.toml").write_text(
        f"""
        model = "model"
        recipe = "grpo"
        data = {{ train = "train.jsonl", held_out = "held_out.jsonl" }}
        rewards.verifier = "sevens.py:score"
        loop = {{ steps = {STEPS}, groups_per_step = {GROUPS}, group_size = {SIZE}, max_lag = 2 }}
        sampling.max_tokens = 32
        generation.slots = 48
        learner = {{ learning_rate = 1e-2, threads = 1, lora = {{ rank = 8 }}, gradient_checkpointing = true }}
        evaluation = {{ every = {STEPS}, samples = 4 }}
        """
    )
    result = jobs.train(config.load(folder / "run.toml"), say=lambda line: None)
    return result, folder


def test_the_engine_samples_from_what_the_learner_computes(finished: tuple[Mapping[str, Any], Path]) -> None:
    found = finished[0]
    assert (found["ended"], found["steps"], found["waste"]["unaccounted"]) == ("finished", STEPS, 0)
    assert found["samples"] == STEPS * GROUPS * SIZE
    assert found["gap_at_lag_0"] is not None and found["gap_at_lag_0"] <= 1e-5
    assert max(map(int, found["lag_histogram"])) <= 2


def test_it_learns(finished: tuple[Mapping[str, Any], Path]) -> None:
    held_out = finished[0]["held_out"]
    assert [evaluation["step"] for evaluation in held_out["all"]] == [0, STEPS]
    assert held_out["last"]["mean"] > held_out["first"]["mean"] + 0.3


def test_versions_are_a_small_share_of_the_model(finished: tuple[Mapping[str, Any], Path]) -> None:
    folder = finished[1]
    sizes = {path.stat().st_size for path in (folder / "runs" / "run" / "weights").glob("*.bin")}
    assert len(sizes) == 1
    assert sizes.pop() < (folder / "model" / "model.safetensors").stat().st_size / 8


def test_the_model_opens_whole_and_as_an_adapter(finished: tuple[Mapping[str, Any], Path]) -> None:
    folder = finished[1]
    directory = folder / "runs" / "run" / "model"
    whole = AutoModelForCausalLM.from_pretrained(directory)
    apart = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder / "model"), directory / "adapter"
    )
    row = AutoTokenizer.from_pretrained(directory)("3 and 4: 77", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(whole(**row).logits, apart(**row).logits, rtol=1e-4, atol=1e-4)
