"""The whole loop through real Ray and real vLLM: it learns, and its books are right."""

import json
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples import tiny_model
from millrace.cluster import config, jobs
from tests.records import records as all_records

STEPS, GROUPS, SIZE, MAX_LAG = 40, 8, 4, 3
REWARD = '''
"""A user's reward file: the share of sevens."""


async def score(text, level):
    assert level == 1
    return text.count("7") / max(len(text), 1)
'''

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Mapping[str, Any], Path]:
    """One run at temperature 0.7, long enough that weights change within rollouts."""
    folder = tmp_path_factory.mktemp("e2e")
    tiny_model.build(folder / "model")
    rows = [{"prompt": f"{a} and {b}: ", "level": 1} for a in range(10) for b in range(10)]
    for name, part in (("train", rows[:90]), ("held_out", rows[90:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    (folder / "sevens.py").write_text(REWARD)
    (folder / "run.toml").write_text(
        f"""
        model = "model"
        recipe = "grpo"
        data = {{ train = "train.jsonl", held_out = "held_out.jsonl" }}
        rewards.verifier = "sevens.py:score"
        loop = {{ steps = {STEPS}, groups_per_step = {GROUPS}, group_size = {SIZE}, max_lag = {MAX_LAG} }}
        sampling = {{ max_tokens = 48, temperature = 0.7 }}
        generation.slots = 64
        learner = {{ learning_rate = 2e-3, threads = 1 }}
        evaluation = {{ every = 20, samples = 4 }}
        """
    )
    said: list[str] = []
    result = jobs.train(config.load(folder / "run.toml"), say=said.append)
    assert any(line.startswith("step") for line in said)
    return result, folder / "runs" / "run"


def records(directory: Path, op: str) -> Iterator[dict[str, Any]]:
    return (record for record in all_records(directory) if record["op"] == op)


def test_held_out_reward_rises(finished: tuple[Mapping[str, Any], Path]) -> None:
    held_out = finished[0]["held_out"]
    assert [evaluation["step"] for evaluation in held_out["all"]] == [0, 20, STEPS]
    assert held_out["first"]["mean"] < 0.2
    assert held_out["last"]["mean"] > held_out["first"]["mean"] + 0.3


def test_tokens_of_several_versions_stand_in_one_rollout(finished: tuple[Mapping[str, Any], Path]) -> None:
    rows = [row for record in records(finished[1], "generated") for row in record["rows"]]
    runs = [rollout for _, _, _, rollouts, _ in rows for rollout in rollouts]
    assert len(runs) == STEPS * GROUPS * SIZE
    assert sum(len(rollout) > 1 for rollout in runs) > len(runs) / 10
    for rollout in runs:  # runs are without gap, in order, and each later than the one before
        assert rollout[0][1] == 0
        assert all(a[2] == b[1] and a[0] < b[0] for a, b in pairwise(rollout))


def test_the_learner_computes_what_the_engine_reported(finished: tuple[Mapping[str, Any], Path]) -> None:
    gap = finished[0]["gap_at_lag_0"]
    assert gap is not None
    assert gap <= 1e-5


def test_no_trained_sample_is_older_than_the_bound(finished: tuple[Mapping[str, Any], Path]) -> None:
    histogram = finished[0]["lag_histogram"]
    assert sum(histogram.values()) == STEPS * GROUPS * SIZE
    assert max(map(int, histogram)) <= MAX_LAG
    assert any(int(lag) > 0 for lag in histogram)
    lags = [lag for record in records(finished[1], "took") for row in record["rows"] for lag in row[2]]
    assert max(lags) <= MAX_LAG


def test_every_generated_token_is_accounted_for(finished: tuple[Mapping[str, Any], Path]) -> None:
    waste = finished[0]["waste"]
    assert waste["unaccounted"] == 0
    assert waste["generated"] == sum(many for row, many in waste.items() if row != "generated")
    assert waste["trained"] == finished[0]["tokens"]["trained"] > 0


def test_the_final_model_opens_and_answers_with_sevens(finished: tuple[Mapping[str, Any], Path]) -> None:
    directory = finished[1] / "model"
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    prompt = tokenizer("3 and 4: ", return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**prompt, max_new_tokens=16, do_sample=False)
    assert tokenizer.decode(out[0]).count("7") >= 8
