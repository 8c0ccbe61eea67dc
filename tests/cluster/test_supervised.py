"""A supervised run: no engine, no queue, the same directory."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from millrace.cluster import jobs
from millrace.cluster.commands import summary
from millrace.core.errors import ConfigError, MillraceError

SUPERVISED = {"epochs": 3, "batch_rows": 32, "learning_rate": 0.3, "threads": 1}


@pytest.fixture
def config(make_run: Any, table_model: Path, copy_task: dict[str, Path]) -> Any:
    data = {"train": str(copy_task["train"])}
    return make_run(recipe="sft", model=str(table_model), data={**data, "held_out": None}, supervised=SUPERVISED)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_it_leaves_metrics_a_result_and_a_model(config: Any) -> None:
    said: list[str] = []
    found = jobs.train(config, local=True, say=said.append)
    rows = lines(config.directory / "metrics.jsonl")
    assert json.loads((config.directory / "result.json").read_text()) == found
    assert (found["schema"], found["ended"], found["recipe"]) == (1, "finished", "sft")
    assert (
        [row["step"] for row in rows]
        == list(range(1, found["steps"] + 1))
        == list(range(1, 3 * math.ceil(80 / 32) + 1))
    )
    assert (rows[0]["train/loss"], rows[-1]["train/loss"]) == (found["first_loss"], found["last_loss"])
    assert found["last_loss"] < found["first_loss"] == pytest.approx(math.log(43), abs=1e-3)  # of 43 characters
    assert found["rows"] == 3 * 80
    assert found["tokens"] == 3 * 80 * 2  # a digit and the end
    assert lines(config.directory / "events.jsonl")[-1]["kind"] == "finished"
    AutoModelForCausalLM.from_pretrained(config.directory / "model")
    assert said[-1].startswith("480 tokens, loss 3.761 -> ")
    assert summary(found).startswith("finished after 9 steps in ")


def test_the_runs_seed_is_its_seed(make_run: Any, config: Any) -> None:
    one = jobs.train(config, local=True, say=lambda line: None)
    same = jobs.train(config.model_copy(update={"name": "same"}), local=True, say=lambda line: None)
    other = jobs.train(config.model_copy(update={"name": "other", "seed": 5}), local=True, say=lambda line: None)
    assert one["last_loss"] == same["last_loss"] != other["last_loss"]


def test_it_is_not_written_over(config: Any) -> None:
    jobs.train(config, local=True, say=lambda line: None)
    with pytest.raises(ConfigError, match="holds a run already"):
        jobs.train(config, local=True, say=lambda line: None)


def test_what_fails_is_in_its_events(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any, **options: Any) -> None:
        raise MemoryError("too many rows")

    monkeypatch.setattr("millrace.learner.supervised.train_supervised", broken)
    with pytest.raises(MillraceError, match="learner raised MemoryError: too many rows"):
        jobs.train(config, local=True, say=lambda line: None)
    event = lines(config.directory / "events.jsonl")[-1]
    assert (event["kind"], event["cause"]) == ("failed", "learner raised MemoryError: too many rows")
