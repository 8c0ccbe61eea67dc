"""Whole runs in one process, on the table engine: what they learn, what they leave, how they fail."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from millrace.cluster import jobs
from millrace.cluster.cli import main
from millrace.cluster.plan import make_plan
from millrace.core.errors import ConfigError, DeadlineError, EngineError, RewardError
from tests.records import records


def train(config: Any, **options: Any) -> Any:
    return jobs.train(config, local=True, say=lambda line: None, **options)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def step_rows(directory: Path) -> list[dict[str, Any]]:
    return [row for row in lines(directory / "metrics.jsonl") if "held_out" not in row]


def assert_books_close(found: Any, *, steps: int, samples: int) -> None:
    """The numbers of a result that must agree whatever happened."""
    waste = dict(found["waste"])
    generated = waste.pop("generated")
    assert found["steps"] == steps
    assert found["samples"] == samples
    assert sum(found["lag_histogram"].values()) == samples
    assert generated == sum(waste.values()) == found["tokens"]["generated"]
    assert waste["trained"] == found["tokens"]["trained"]
    assert waste["unaccounted"] == 0
    assert sum(found["idle"]["learner"].values()) == pytest.approx(1)
    assert found["idle"]["learner"]["other"] <= 0.02


@pytest.fixture(scope="module")
def ran(make_run_in: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A run that several tests look at: its configuration and its result."""
    config = make_run_in(
        tmp_path_factory.mktemp("ran"),
        seed=3,
        loop={"steps": 10},
        learner={"checkpoint_every": 4},
        evaluation={"every": 4, "samples": 2, "pass_at": [1, 2]},
    )
    return config, train(config)


def test_a_run_learns_and_leaves_what_it_promises(ran: Any) -> None:
    config, found = ran
    directory = config.directory
    assert json.loads((directory / "result.json").read_text()) == found
    assert (found["schema"], found["ended"], found["recipe"], found["seed"]) == (1, "finished", "grpo", 3)
    assert {"torch", "transformers", "numpy", "ray"} <= found["packages"].keys()
    assert_books_close(found, steps=10, samples=10 * 16 * 8)
    assert max(map(int, found["lag_histogram"])) <= found["max_lag"] == 1
    assert found["gap_at_lag_0"] < 1e-5
    assert found["held_out"]["first"]["mean"] < 0.4
    assert found["held_out"]["last"]["mean"] > 0.9
    assert found["reward"]["first"] < 0.4
    assert found["reward"]["last"] > 0.8
    rates, seconds = found["throughput"], found["seconds"]
    assert rates["samples_per_s"] * seconds == pytest.approx(found["samples"])
    assert rates["generated_tokens_per_s"] * seconds == pytest.approx(found["tokens"]["generated"])
    assert rates["trained_tokens_per_s"] * seconds == pytest.approx(found["tokens"]["trained"])
    assert all(0 <= sum(found["idle"][worker].values()) <= 1 for worker in ("generation-0", "reward-0"))
    assert found["draws"]["committed"] == 10 * 16 == sum(found["draws"].values())
    assert found["invalid_rollouts"] == 0


def test_every_step_has_one_row_in_order_and_the_result_is_their_summary(ran: Any) -> None:
    config, found = ran
    rows = step_rows(config.directory)
    assert [row["step"] for row in rows] == [row["version"] for row in rows] == list(range(1, 11))
    assert all(row["rollout/count"] == 16 * 8 for row in rows)
    assert found["reward"] == {"first": rows[0]["reward/mean"], "last": rows[-1]["reward/mean"]}
    assert sum(row["train/tokens"] for row in rows) == found["tokens"]["trained"]
    assert found["seconds"] == pytest.approx(sum(row["time/step_s"] for row in rows))
    assert found["gap_at_lag_0"] == max(row["lag_0/max_gap"] for row in rows if "lag_0/max_gap" in row)


def test_evaluations_are_of_every_kth_step_and_the_last_at_those_versions(ran: Any) -> None:
    config, found = ran
    done = found["held_out"]["all"]
    assert [each["step"] for each in done] == [each["version"] for each in done] == [0, 4, 8, 10]
    assert all(each["prompts"] == 20 and each["invalid"] == 0 for each in done)
    assert found["held_out"]["first"] == done[0]
    assert found["held_out"]["last"] == done[-1]
    recorded = [row for row in lines(config.directory / "metrics.jsonl") if "held_out" in row]
    assert sorted((row["step"], row["held_out/mean"]) for row in recorded) == [(e["step"], e["mean"]) for e in done]


def test_the_model_opens_and_is_the_last_checkpoint(ran: Any) -> None:
    config, found = ran
    model = AutoModelForCausalLM.from_pretrained(config.directory / "model")
    saved = AutoModelForCausalLM.from_pretrained(found["checkpoint"])
    assert Path(found["checkpoint"]).name.startswith("step_10.")
    assert torch.equal(model.table, saved.table)
    assert not torch.equal(model.table, AutoModelForCausalLM.from_pretrained(config.model).table)
    assert {path.name for path in (config.directory / "model").iterdir()} >= {"config.json", "tokenizer.json"}
    assert not (config.directory / "model" / "learner").exists()
    tokens = AutoTokenizer.from_pretrained(config.directory / "model")("3=7", return_tensors="pt")["input_ids"]
    assert model(tokens).logits[0, -1].argmax() == tokens[0, -1]


def test_what_is_watched_does_not_spin(ran: Any) -> None:
    _, found = ran
    calls = found["calls"]["by_method"]
    assert calls["take"] <= 2 * 10
    assert calls["lease_draws"] <= 10 * 16
    assert calls["status"] <= 4 * (2 + found["seconds"]) + 5
    assert found["calls"]["of_the_queue_per_trained_rollout"] == pytest.approx(sum(calls.values()) / found["samples"])


def test_a_synchronous_run_is_reproducible_to_the_bit(make_run: Any) -> None:
    models, rewards = [], []
    unshuffled = {"shuffle": False}  # so that the seed is that of sampling alone
    for name in ("one", "two"):
        config = make_run(name, data=unshuffled, loop={"steps": 4, "max_lag": 0})
        found = train(config)
        assert found["lag_histogram"] == {"0": 4 * 16 * 8}
        models.append((config.directory / "model" / "model.safetensors").read_bytes())
        rewards.append([row["reward/mean"] for row in step_rows(config.directory)])
    assert models[0] == models[1]
    assert rewards[0] == rewards[1]
    other = make_run("other", seed=1, data=unshuffled, loop={"steps": 1, "max_lag": 0})
    train(other)
    assert step_rows(other.directory)[0]["reward/mean"] != rewards[0][0]


@pytest.mark.parametrize(
    "rule",
    [
        {"stale": "wait"},
        {"stale": "mask"},
        {"stale": "train"},
        {"stale": "drop"},
        {"stale": "requeue", "requeues": 1, "stale_then": "mask"},
    ],
    ids=lambda rule: rule["stale"],
)
def test_every_stale_rule_finishes_and_closes_its_books(make_run: Any, rule: dict[str, Any]) -> None:
    """Two engines that race for the draws."""
    found = train(make_run(loop={"steps": 8, "max_lag": 2, **rule}, generation={"workers": 2, "slots": 128}))
    assert_books_close(found, steps=8, samples=8 * 16 * 8)
    if rule["stale"] in ("wait", "drop"):
        assert max(map(int, found["lag_histogram"])) <= 2
    assert found["held_out"]["last"]["mean"] > 0.7


REWARDS = """
import asyncio
from millrace.core.types import Verdict, VerdictKind

CALLS = 0

def raises(text, answer):
    raise ValueError("no such key")

def string(text, answer):
    return "good"

def nan(text, answer):
    return float("nan")

async def never(text, answer):
    await asyncio.sleep(1000)

def sometimes(text, answer):
    global CALLS
    CALLS += 1
    if CALLS % 7 == 0:
        raise ValueError("every seventh")
    return 0.5

def not_one_row(text, answer, prompt):
    if prompt == "3=4":
        raise ValueError("a bad row")
    return float(text == answer)

def not_held_out(text, level):
    if int(level) >= 8:
        raise ValueError("not this one")
    return 1.0

async def later(text, answer):
    await asyncio.sleep(0)
    return float(text == answer)

def verdict(text, answer):
    return Verdict(kind=VerdictKind.SCORED, score=float(text == answer), components={"length": float(len(text))})
"""


@pytest.fixture
def rewards_file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(REWARDS)
    return path


@pytest.mark.parametrize(
    ("function", "cause"),
    [
        ("raises", r"mine\.py:raises raised ValueError: no such key.*line \d+, in raises"),
        ("string", r"mine\.py:string returned 'good': .* a str, not a number; return a float"),
        ("nan", r"mine\.py:nan returned nan: .*not finite"),
    ],
)
def test_a_reward_that_always_fails_ends_the_run_with_its_cause(
    make_run: Any, rewards_file: Path, function: str, cause: str
) -> None:
    config = make_run(rewards={"verifier": f"mine.py:{function}"})
    with pytest.raises(RewardError, match=f"(?s)64 judge failures in a row.*max_judge_failures.*{cause}") as caught:
        train(config)
    assert "prompt 'train:" in str(caught.value)
    events = lines(config.directory / "events.jsonl")
    assert events[-1]["kind"] == "failed"
    assert events[-1]["cause"] == str(caught.value)
    assert not (config.directory / "result.json").exists()


def test_one_bad_row_is_left_out_and_said_and_the_run_goes_on(make_run: Any, rewards_file: Path) -> None:
    config = make_run(
        loop={"steps": 10, "group_size": 32, "groups_per_step": 10}, rewards={"verifier": "mine.py:not_one_row"}
    )
    said: list[str] = []
    found = jobs.train(config, local=True, say=said.append)
    assert found["ended"] == "finished" and found["waste"]["unaccounted"] == 0
    (event,) = [each for each in lines(config.directory / "events.jsonl") if each["kind"] == "judge failures"]
    assert found["judge_failures"]["verdicts"] == event["verdicts"] >= 64
    assert "mine.py:not_one_row raised ValueError: a bad row; prompt 'train:" in found["judge_failures"]["first"]
    assert "catalogue.py" not in found["judge_failures"]["first"]
    assert event["given_up_draws"] >= 1
    (line,) = [text for text in said if "verdicts failed" in text]
    assert f"{event['given_up_draws']} draws were given up; the first: reward function" in line


def test_no_length_is_trained_less_often_than_another(ran: Any) -> None:
    _, found = ran
    rows = found["trained_by_length"]
    assert sum(row["generated"] for row in rows) == found["samples"]
    assert all(row["trained"] == 1.0 for row in rows)


def test_a_run_that_failed_before_its_first_step_is_simply_run_again(make_run: Any, rewards_file: Path) -> None:
    config = make_run(rewards={"verifier": "mine.py:string"})
    with pytest.raises(RewardError):
        train(config)
    found = train(make_run(rewards={"verifier": "exact"}))
    rows = lines(config.directory / "metrics.jsonl")
    assert found["ended"] == "finished"
    assert [row["step"] for row in rows if "held_out" in row] == [0, 4, 8, 12]


@pytest.mark.ray
def test_the_command_fails_with_status_1_and_no_traceback_of_ours(
    make_run: Any, rewards_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_run(rewards={"verifier": "mine.py:string"})
    path = tmp_path / "run.toml"
    jobs.configs.save(config, path)
    with pytest.raises(SystemExit) as ended:
        main(["train", str(path), "--local"])
    assert ended.value.code == 1
    said = capsys.readouterr()
    assert said.err.startswith("millrace: 64 judge failures in a row")
    assert "Traceback" not in said.err


def test_a_reward_that_fails_now_and_then_is_counted_and_never_a_zero(make_run: Any, rewards_file: Path) -> None:
    config = make_run(loop={"steps": 6, "judge_retries": 0}, rewards={"verifier": "mine.py:sometimes"})
    found = train(config)
    rows = step_rows(config.directory)
    failed = [row["reward/invalid_rollouts"] for row in rows]
    assert all(10 < many < 30 for many in failed)  # a seventh of 128
    assert found["invalid_rollouts"] == sum(failed)
    assert found["waste"]["masked"] > sum(failed)  # tokens
    assert_books_close(found, steps=6, samples=6 * 16 * 8)
    assert all(row["reward/mean"] == 0.5 and row["reward/std"] == 0 for row in rows)
    assert found["held_out"]["last"]["mean"] == 0.5
    assert found["held_out"]["last"]["invalid"] > 0


def test_no_share_of_the_learners_time_is_negative(make_run: Any) -> None:
    found = train(make_run(loop={"steps": 3}))
    assert all(share >= -1e-9 for share in found["idle"]["learner"].values())


@pytest.mark.ray
def test_an_evaluation_without_one_score_is_said_so(
    make_run: Any, rewards_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_run(loop={"steps": 3}, rewards={"verifier": "mine.py:not_held_out"})
    path = tmp_path / "run.toml"
    jobs.configs.save(config, path)
    main(["train", str(path), "--local"])
    said = capsys.readouterr().out
    assert "held-out before training: no score" in said
    assert "held-out reward no score -> no score" in said
    found = json.loads((config.directory / "result.json").read_text())
    assert found["held_out"]["last"]["invalid"] == 20


@pytest.mark.parametrize("function", ["later", "verdict"])
def test_async_and_verdict_rewards_train(make_run: Any, rewards_file: Path, function: str) -> None:
    found = train(make_run(loop={"steps": 8}, rewards={"verifier": f"mine.py:{function}"}))
    assert_books_close(found, steps=8, samples=8 * 16 * 8)
    assert found["held_out"]["last"]["mean"] > 0.7


def test_a_run_that_stands_still_ends_and_says_who_waits(make_run: Any, rewards_file: Path) -> None:
    config = make_run(stall_s=0.3, loop={"max_lag": 0}, rewards={"verifier": "mine.py:never", "concurrency": 64})
    with pytest.raises(DeadlineError) as caught:
        train(config)
    said = str(caught.value)
    assert "step 0 did not end" in said
    assert "stall_s = 0.3" in said
    assert "'judging': 16" in said
    assert "learner: step 0 has 0 scored groups for 16 places" in said
    assert lines(config.directory / "events.jsonl")[-1]["kind"] == "failed"


def test_an_engine_that_fails_ends_the_run_with_its_cause(make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*args: Any, **options: Any) -> None:
        raise EngineError("no memory left")

    monkeypatch.setattr("millrace.actors.engines.table.TableEngine.sample", broken)
    config = make_run(data={"held_out": None})
    with pytest.raises(EngineError, match=r"generation-0: 8 groups in a row failed .*no memory left"):
        train(config)
    assert "no memory left" in lines(config.directory / "events.jsonl")[-1]["cause"]


def test_a_directory_that_holds_a_run_is_not_written_over(make_run: Any) -> None:
    config = make_run(loop={"steps": 1})
    train(config)
    before = {path: path.stat().st_mtime_ns for path in config.directory.rglob("*")}
    with pytest.raises(ConfigError, match=r"runs/run holds a run already: continue it with --resume .*runs/run"):
        train(config)
    assert {path: path.stat().st_mtime_ns for path in config.directory.rglob("*")} == before


def test_nothing_is_left_of_a_plan_that_does_not_hold(make_run: Any) -> None:
    config = make_run(rewards={"verifier": "exakt"})
    with pytest.raises(RewardError, match="unknown verifier 'exakt'"):
        train(config)
    assert not config.directory.exists()


def test_every_draw_is_trained_once(ran: Any) -> None:
    config, _ = ran
    taken_records = records(config.directory)
    taken = Counter(row[0] for record in taken_records if record["op"] == "took" for row in record["rows"])
    assert len(taken) == 10 * 16
    assert set(taken.values()) == {1}


def test_two_vllm_engines_in_one_process_are_refused(make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(make_run())
    monkeypatch.setitem(plan.engine, "name", "vllm")  # type: ignore[arg-type]  # a dict underneath
    with pytest.raises(ConfigError, match=r"2 vLLM engines .*held-out evaluation.*leave out --local"):
        jobs._refuse_two_engines(plan)
