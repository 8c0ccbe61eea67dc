"""A whole run with adapters, in this process: engines get them merged, the books close, the model opens both ways."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples import tiny_model
from millrace.cluster import config, jobs
from millrace.cluster.plan import make_plan
from millrace.core.errors import ConfigError
from millrace.core.weights import buffer_bytes, from_json, layout

STEPS, GROUPS, SIZE = 12, 4, 6
REWARD = '''
"""The share of letters among the answer's characters."""


def score(text):
    return sum(map(str.isalpha, text)) / max(len(text), 1)
'''


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("lora")
    tiny_model.build(root / "model")
    (root / "letters.py").write_text(REWARD)
    rows = [{"prompt": f"{a}{b}: "} for a in range(6) for b in range(6)]
    for name, part in (("train", rows[:30]), ("held_out", rows[30:])):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))

    def run(name: str, **sections: Any) -> Any:
        table: dict[str, Any] = {
            "model": "model",
            "data": {"train": "train.jsonl", "held_out": "held_out.jsonl"},
            "rewards": {"verifier": "letters.py:score", "poll_s": 0.1, "heartbeat_s": 0.1},
            "loop": {"steps": STEPS, "groups_per_step": GROUPS, "group_size": SIZE, "max_lag": 1},
            "sampling": {"max_tokens": 8},
            "generation": {"engine": "transformers", "slots": 48, "heartbeat_s": 0.1, "linger_s": 0.01},
            "learner": {"learning_rate": 1e-2, "threads": 1, "checkpoint_every": 5, "lora": {"rank": 4, "alpha": 8}},
            "evaluation": {"every": STEPS, "samples": 4},
        }
        for key, value in sections.items():
            table[key] = {**table.get(key, {}), **value} if isinstance(value, dict) else value
        return config.of(table, root=root, source="run.toml", name=name)

    return run


def train(run: Any, **options: Any) -> Any:
    return jobs.train(run, local=True, say=lambda line: None, **options)


@pytest.fixture(scope="module")
def ran(make: Any) -> tuple[Any, Any]:
    run = make("ran")
    return run, train(run)


def test_it_learns_and_its_books_close(ran: Any) -> None:
    found = ran[1]
    waste = dict(found["waste"])
    assert waste.pop("generated") == sum(waste.values()) == found["tokens"]["generated"]
    assert (found["steps"], found["samples"], waste["unaccounted"]) == (STEPS, STEPS * GROUPS * SIZE, 0)
    assert found["gap_at_lag_0"] < 1e-5, "engines sample from what the learner computes with its adapters"
    assert found["held_out"]["last"]["mean"] > found["held_out"]["first"]["mean"] + 0.05


def test_what_is_published_is_the_adapter_alone(ran: Any) -> None:
    texts = sorted((ran[0].directory / "weights").glob("*.json"))
    manifests = [from_json(path.read_text(), source=str(path)) for path in texts]
    assert manifests and all(manifest.adapter is not None for manifest in manifests)
    model = AutoModelForCausalLM.from_pretrained(ran[0].model)
    whole = buffer_bytes(layout((name, "float32", tuple(p.shape)) for name, p in model.named_parameters()))
    for path, manifest in zip(texts, manifests, strict=True):
        size = path.with_suffix(".bin").stat().st_size
        # Two layers, rank 4, four bytes: inputs and outputs of four square and three wide matrices.
        assert size == buffer_bytes(manifest.tensors) == 2 * 4 * 4 * (4 * (128 + 128) + 3 * (128 + 384))
        assert size < whole / 10


def test_the_final_model_opens_whole_and_as_an_adapter_of_its_base(ran: Any) -> None:
    directory: Path = ran[0].directory / "model"
    whole = AutoModelForCausalLM.from_pretrained(directory)
    apart = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(ran[0].model), directory / "adapter")
    row = AutoTokenizer.from_pretrained(directory)("12: abc", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(whole(**row).logits, apart(**row).logits, rtol=1e-4, atol=1e-4)
    base = dict(AutoModelForCausalLM.from_pretrained(ran[0].model).named_parameters())
    changed = {name for name, p in whole.named_parameters() if not torch.equal(p, base[name])}
    assert changed == {name for name in base if name.endswith("_proj.weight")}


def test_a_run_that_was_stopped_goes_on_from_its_adapters(make: Any) -> None:
    run = make("again", loop={"steps": 3}, evaluation={"every": 100})
    train(run)
    first = _adapter(run.directory)
    longer = run.model_copy(update={"loop": run.loop.model_copy(update={"steps": 6})})
    config.save(longer, run.directory / "config.toml")
    found = train(config.of_directory(run.directory), resume=True)
    assert (found["steps"], found["waste"]["unaccounted"]) == (6, 0)
    assert found["gap_at_lag_0"] < 1e-5
    second = _adapter(run.directory)
    assert first.keys() == second.keys()
    assert any(not np.array_equal(first[name], second[name]) for name in first)


def _adapter(directory: Path) -> dict[str, Any]:
    file = next(iter(sorted(directory.glob("model/adapter/adapter_model.safetensors"))))
    return peft.utils.load_peft_weights(str(file.parent))


def test_half_precision_and_checkpointing_go_with_it(make: Any) -> None:
    settings = {"compute_dtype": "bfloat16", "gradient_checkpointing": True}
    run = make("half", loop={"steps": 3}, learner={**settings, "lora": {"rank": 2}}, generation={"dtype": "bfloat16"})
    found = train(run)
    assert (found["steps"], found["waste"]["unaccounted"]) == (3, 0)
    assert found["gap_at_lag_0"] < 0.1


def test_a_supervised_run_leaves_both_too(make: Any, tmp_path: Path) -> None:
    rows = [{"prompt": f"{a}: ", "answer": "yes" if a % 2 else "no"} for a in range(8)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"epochs": 6, "batch_rows": 4, "learning_rate": 1e-2, "threads": 1, "lora": {"rank": 4}}
    run = make("sft", recipe="sft", data={"train": str(data), "held_out": None}, supervised=settings)
    found = train(run)
    assert found["last_loss"] < 0.7 * found["first_loss"]
    assert (run.directory / "model" / "adapter" / "adapter_config.json").is_file()


@pytest.mark.parametrize("section", ["learner", "supervised"])
def test_unknown_targets_are_refused_before_anything_starts(make: Any, section: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {section: {"lora": {"targets": ["q_proj", "up_porj"]}}}
    if section == "supervised":
        data = tmp_path / "rows.jsonl"
        data.write_text('{"prompt": "a", "answer": "b"}\n')
        changes |= {"recipe": "sft", "data": {"train": str(data), "held_out": None}}
    with pytest.raises(ConfigError, match="no linear layer 'up_porj' in its blocks; did you mean 'up_proj'"):
        make_plan(make("never", **changes))
