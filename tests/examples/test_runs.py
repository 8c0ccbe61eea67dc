"""Every example parses and passes the checks before a run, the sums of the node are right, and all of them run."""

import importlib
import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from examples import tiny_model, warm_start
from examples.own_reward.__main__ import compared
from examples.sync_and_async.__main__ import summary, table
from millrace import RunConfig
from millrace.cluster.jobs import dry_run
from millrace.core.replay import limiter

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NODE = EXAMPLES / "gpu_node_7b" / "run.toml"
TINY = ("arithmetic", "chat", "countdown", "own_reward", "sorting", "sync_and_async")
WITH_A_WARM_START = ("chat", "countdown", "own_reward", "sync_and_async")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp("tiny")
    tiny_model.build(directory)
    return directory


def test_these_are_all_examples() -> None:
    assert {path.parent for path in EXAMPLES.rglob("*.toml")} == {EXAMPLES / name for name in (*TINY, NODE.parent.name)}
    listed = re.findall(r"^\| \[(\w+)\]", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted((*WITH_A_WARM_START, "gpu_node_7b", "sorting", "arithmetic"))


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_example_passes_the_checks_before_a_run(name: str, model: Path, tmp_path: Path) -> None:
    plan = dry_run(RunConfig.load(EXAMPLES / name / "run.toml", model=str(model), runs=str(tmp_path)))
    assert plan.prompts and plan.held_out and not plan.notes
    assert plan.engine["max_model_len"] <= tiny_model.CONTEXT_TOKENS


def test_an_example_that_has_a_warm_start_trains_what_that_writes() -> None:
    for name in WITH_A_WARM_START:
        config = RunConfig.load(EXAMPLES / name / "run.toml")
        assert Path(config.model) == warm_start.RUNS / "models" / name
        assert Path(config.runs) == warm_start.RUNS
        assert config.name == ("run" if name == "sync_and_async" else name)  # that one names its two runs itself


def test_chat_messages_become_the_template_and_its_special_tokens(model: Path, tmp_path: Path) -> None:
    plan = dry_run(RunConfig.load(EXAMPLES / "chat" / "run.toml", model=str(model), runs=str(tmp_path)))
    tokenizer = AutoTokenizer.from_pretrained(model)
    second = next(prompt for prompt in plan.prompts if "reverse" in prompt.text)
    found = re.fullmatch(r"<bos>user:sort \d{4}\nassistant:\d{4}<eos>\nuser:reverse\nassistant:", second.text)
    assert found, second.text
    ids = second.tokens_P.tolist()
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.unk_token_id not in ids and len(ids) == len(second.text) - len("<bos><eos>") + 2


def test_every_number_of_the_node_has_a_comment() -> None:
    lines = NODE.read_text().splitlines()
    bare = [line for line in lines if re.match(r"\w+ = (true|\[|\d)", line) and "  # " not in line]
    assert bare == []
    # The engine's number is explained in the lines above it.
    numbered = [line for line in lines if re.match(r"\w+ = \{", line) and re.search(r"= \d", line) and "#" not in line]
    assert numbered == ['engine = { name = "vllm", gpu_memory_utilization = 0.9 }']
    assert len(re.findall(r"^\w+ = (?:true|\[|\d)", NODE.read_text(), re.MULTILINE)) > 35


def test_the_node_is_said_not_to_have_been_run() -> None:
    assert "NOT RUN BY US" in NODE.read_text()


def test_the_node_is_used_up_and_no_slot_stays_idle() -> None:
    config = RunConfig.load(NODE)
    loop, generation = config.loop, config.generation
    assert generation.workers * generation.gpus + config.learner.gpus + config.evaluation.gpus == 8
    slots = generation.workers * generation.slots
    sizes = {"groups_per_step": loop.groups_per_step, "group_size": loop.group_size}
    assert limiter.idle_slots(slots, max_lag=loop.max_lag, **sizes) == 0
    assert limiter.idle_slots(slots, max_lag=2, **sizes) == 0 < limiter.idle_slots(slots, max_lag=1, **sizes)
    assert config.sampling.max_tokens < config.generation.context
    assert config.judging.verifier == {"name": "math", "deadline_s": 3.0, "processes": 4}
    assert config.recipe.rewards.filters == ("zero_variance",)
    assert config.learner.compute_dtype == config.generation.dtype == "bfloat16"


def test_the_sums_in_the_nodes_comments_are_right() -> None:
    """Qwen2.5-7B: 28 blocks, hidden 3,584, feed-forward 18,944, 4 key and value heads of 128, vocabulary 152,064."""
    said = NODE.read_text()
    blocks, hidden, inner, kv, vocabulary = 28, 3584, 18_944, 4 * 128, 152_064
    linear = blocks * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner)
    vectors = blocks * (hidden + 2 * kv + 2 * hidden) + hidden
    weights = linear + vectors + 2 * vocabulary * hidden
    config = RunConfig.load(NODE)
    lora, budget = config.learner.lora, config.learner.token_budget
    assert lora is not None and lora.alpha / lora.rank == 1
    adapters = lora.rank * blocks * (2 * (hidden + hidden) + 2 * (hidden + kv) + 3 * (hidden + inner))
    cache = 2 * blocks * kv * 2
    room = 0.9 * 80e9 - 2 * weights - 3e9
    for text in (
        f"{weights:,} weights",
        f"{linear:,} in the linear layers",
        f"{16 * weights / 1e9:.1f} GB: not on 80 GB",
        f"{4 * weights / 1e9:.1f} GB",
        f"adapters' {adapters:,}",
        f"{16 * adapters / 1e9:.1f} GB",
        f"{4 * budget * hidden * blocks / 1e9:.1f} GB",
        f"linear layers ({2 * linear / 1e9:.1f} GB)",
        f"({2 * weights / 1e9:.1f} GB each)",
        f"{cache:,} bytes per token",
        f"{4 * adapters / 1e9:.2f} GB",
    ):
        assert text in said, text
    assert room / cache == pytest.approx(938_000, rel=0.01)
    receiver = (2 * linear + 2 * 2 * weights) / 1e9
    assert f"{receiver:.0f} GB" == "44 GB" and 7 * receiver == pytest.approx(305, abs=1)
    assert 4 * 4 * weights / 1e9 == pytest.approx(122, abs=0.5)  # checkpoints
    assert 1 - 0.95**config.loop.group_size == pytest.approx(0.56, abs=0.005)


ROWS = [
    {
        "step": step,
        "time/step_s": seconds,
        "time/wait_s": waited,
        "rollout/count": 8,
        "train/tokens": 100,
    }
    for step, seconds, waited in ((1, 50.0, 49.0), (2, 2.0, 0.5), (3, 2.0, 1.5))
]


def test_the_comparison_leaves_the_first_step_out_of_its_rates() -> None:
    result = {
        "lag_histogram": {"0": 3, "2": 1},
        "idle": {"generation-0": 0.25},
        "held_out": {"first": {"mean": 0.5}, "last": {"mean": 0.75}},
        "tokens": {"generated": 330, "trained": 300},
    }
    found = summary(result, ROWS)
    assert list(found.values()) == [
        "0.50", "4", "50", "50%", "25%", "0.50", "2", "0.500", "0.750", "330", "300",
    ]  # fmt: skip
    lines = table({"one": found, "two": {**found, "steps/s": "0.75"}}).splitlines()
    assert lines[0].split() == ["one", "two"]
    assert lines[1].split() == ["steps/s", "0.50", "0.75"]
    assert len({len(line) for line in lines}) == 1 and len(lines) == 1 + len(found)


def test_components_are_compared_at_both_ends_of_a_run() -> None:
    samples = [
        {"step": step, "verdict": {"components": {"format": float(step > 6 or (step == 1 and place == 0))}}}
        for step in range(1, 12)
        for place in range(2)
    ]
    assert compared("".join(json.dumps(each) + "\n" for each in samples)).startswith("in brackets 10% -> 100%")


@pytest.fixture
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """An example's module that writes to the test's folder, after a warm start of few steps."""

    def prepared(name: str) -> Any:
        module = importlib.import_module(f"examples.{name}.__main__")
        for place in (module, warm_start):
            monkeypatch.setattr(place, "RUNS", tmp_path, raising=False)
        for steps in ("WARM_STEPS", "SOLVED_STEPS", "GUESSED_STEPS"):
            if hasattr(module, steps):
                monkeypatch.setattr(module, steps, 5)
        return module

    return prepared


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.parametrize("name", WITH_A_WARM_START)
def test_an_example_runs(
    name: str, in_a_folder: Callable[[str], Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = {"model": str(tmp_path / "models" / name), "runs": str(tmp_path), "loop.steps": 3, "evaluation.every": 3}
    module = in_a_folder(name)
    if name == "sync_and_async":
        module.main({key.replace(".", "__"): value for key, value in settings.items()})
        runs = list(module.ARMS)
    else:
        module.main([f"{key}={value}" for key, value in settings.items()])
        runs = [name]
    for run in runs:
        result = json.loads((tmp_path / run / "result.json").read_text())
        assert (result["ended"], result["steps"], result["waste"]["unaccounted"]) == ("finished", 3, 0)
        assert [each["step"] for each in result["held_out"]["all"]] == [0, 3]
        assert tomllib.loads((tmp_path / run / "config.toml").read_text())["model"] == settings["model"]
    said = capfd.readouterr().out
    assert "warm start" in said
    assert {"own_reward": "in brackets", "sync_and_async": "engine waits"}.get(name, "held-out reward") in said
