"""What result.json is made of, and the lines a person reads meanwhile."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from millrace.actors.evaluation import Evaluation
from millrace.cluster.plan import make_plan
from millrace.cluster.progress import Meter, count, duration, mean_lag, waits
from millrace.cluster.record import Recorder
from millrace.cluster.result import packages, result, row, shares
from millrace.cluster.run import export
from millrace.core.protocols import QueueStatus
from millrace.learner.report import StepReport
from millrace.learner.step import LagNumbers, StepNumbers


def status(step: int, **changes: Any) -> QueueStatus:
    facts: dict[str, Any] = {
        "step": step,
        "committed_step": 0,
        "newest_version": step,
        "states": {"committed": 0},
        "tokens": {"generated": 100 * step, "trained": 90 * step, "unaccounted": 0},
        "lag_histogram": {0: 4, 1: 8 * step - 4} if step else {},
        "idle": {},
        "calls": {"take": step},
    }
    return QueueStatus(**{**facts, **changes})


def at_lag(tokens: int) -> LagNumbers:
    return LagNumbers(tokens=tokens, k3=0.0, max_gap=1e-7, effective_sample_size=1.0, clip_fraction=0.0)


def report(step: int, **changes: Any) -> StepReport:
    numbers = StepNumbers(
        loss=0.1, gradient_norm=1.0, learning_rate=0.01, entropy=2.0, metrics={}, by_lag={0: at_lag(30), 2: at_lag(60)}
    )
    facts: dict[str, Any] = dict.fromkeys(StepReport.__slots__, 0)
    facts |= {"step": step, "version": step, "numbers": numbers, "rollouts": 8, "reward": 0.1 * step, "tokens": 90}
    facts |= {
        "wait_s": 0.5,
        "compute_s": 1.0,
        "publish_s": 0.25,
        "checkpoint_s": 0.125,
        "other_s": 0.125,
        "step_s": 2.0,
    }
    return StepReport(**{**facts, **changes})


def found(make_run: Any, reports: list[StepReport], **changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "ended": "finished",
        "rows": [row(each) for each in reports],
        "resumed_at": 0,
        "evaluations": [],
        "status": status(len(reports)),
        "idle_workers": {},
        "checkpoint": None,
    }
    return result(make_plan(make_run()), **{**given, **changes})


def test_rates_are_over_the_time_in_which_steps_were_made(make_run: Any) -> None:
    made = found(make_run, [report(1), report(2), report(3)])
    assert made["seconds"] == 6
    assert made["samples"] == 24
    assert made["throughput"] == {
        "samples_per_s": 4.0,
        "generated_tokens_per_s": 50.0,
        "trained_tokens_per_s": 45.0,
    }
    assert made["lag_histogram"] == {"0": 4, "1": 20}
    assert made["gap_at_lag_0"] == 1e-7
    assert made["idle"]["learner"] == {
        "waiting for data": 0.25,
        "computing": 0.5,
        "publishing weights": 0.125,
        "writing checkpoints": 0.0625,
        "other": 0.0625,
    }


def test_calls_of_a_resumed_run_are_set_against_its_own_rollouts(make_run: Any) -> None:
    made = found(make_run, [report(1), report(2), report(3)], resumed_at=1)
    assert made["calls"]["of_the_queue_per_trained_rollout"] == 3 / 16


def test_a_run_without_a_step_has_no_rewards_and_no_rates(make_run: Any) -> None:
    made = found(make_run, [], ended="stopped")
    assert (made["reward"], made["held_out"], made["gap_at_lag_0"], made["seconds"]) == (None, None, None, 0)
    assert set(made["throughput"].values()) == {0.0}
    assert set(shares([]).values()) == {0.0}
    json.dumps(made, allow_nan=False)


def test_versions_of_packages_are_those_installed() -> None:
    assert packages()["torch"].startswith("2.")
    assert "no-such-package" not in packages()


def test_rewinding_forgets_what_will_be_made_again(tmp_path: Path) -> None:
    with Recorder(tmp_path) as record:
        for step in (1, 2, 3):
            record.metrics(step, {"reward/mean": step / 10})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "torn')
    with Recorder(tmp_path) as record:
        assert [each["reward/mean"] for each in record.rewind(2)] == [0.1, 0.2]
        record.metrics(3, {"reward/mean": 0.7})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(each["step"], each["reward/mean"]) for each in rows] == [(1, 0.1), (2, 0.2), (3, 0.7)]
    assert [path.name for path in tmp_path.glob("metrics*")] == ["metrics.jsonl"]


def test_an_export_is_the_checkpoint_without_the_learners_part(tmp_path: Path) -> None:
    checkpoint = tmp_path / "step_3.1"
    (checkpoint / "learner").mkdir(parents=True)
    for name in ("model.safetensors", "config.json", "files.json", "learner/optimiser.safetensors"):
        (checkpoint / name).write_text(name)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "stale.safetensors").write_text("of an earlier export")
    export(checkpoint, tmp_path / "model")
    assert {path.name for path in (tmp_path / "model").iterdir()} == {"model.safetensors", "config.json"}


NUMBER_LESS = re.compile(r"\b(nan|inf|none)\b", re.IGNORECASE)


def test_a_line_says_how_far_how_well_and_who_waits(make_run: Any) -> None:
    loop = make_run().loop
    meter = Meter(10.0)
    meter.reports += [report(1), report(2)]
    idle = {"generation-0": "16 rollout slots stay idle: at step 2, version 1", "reward-0": "no generated group"}
    evaluation = Evaluation(
        version=0, step=0, prompts=2, samples=1, mean=0.25, pass_at_k={}, scores={}, invalid=0, seconds=1.0
    )
    line = meter.line(loop, now_s=14.0, status=status(2, idle=idle), evaluation=evaluation, eta_s=75)
    for part in (
        " 2/12",
        "reward 0.150",
        "held-out 0.250",
        "1.3",
        "50 tok/s",
        "45 tok/s",
        "25%",
        "generation-0",
        "1:15",
    ):
        assert part in line
    assert not NUMBER_LESS.search(line)
    later = meter.line(loop, now_s=16.0, status=status(2), evaluation=None, eta_s=0)
    assert "generate 0 tok/s" in later  # the same counter as in the line before
    assert not NUMBER_LESS.search(later)


@pytest.mark.parametrize("step", [0, 5])
def test_a_line_without_news_is_a_line_all_the_same(make_run: Any, step: int) -> None:
    line = Meter(10.0).line(make_run().loop, now_s=10.0, status=status(step, tokens={}), evaluation=None, eta_s=0.0)
    assert f"{step}/12" in line
    assert not NUMBER_LESS.search(line)


def test_an_evaluation_without_a_score_is_no_number(make_run: Any) -> None:
    evaluation = Evaluation(
        version=0, step=0, prompts=0, samples=1, mean=float("nan"), pass_at_k={}, scores={}, invalid=2, seconds=1.0
    )
    line = Meter(10.0).line(make_run().loop, now_s=14.0, status=status(2), evaluation=evaluation, eta_s=1.0)
    assert "nan" not in line


def test_lag_is_the_mean_over_tokens() -> None:
    assert mean_lag([report(1)]) == pytest.approx(2 * 60 / 90)
    assert mean_lag([]) == 0


def test_several_engines_that_wait_are_counted() -> None:
    idle = {f"generation-{i}": "64 rollout slots stay idle: and so on" for i in range(3)}
    said = waits(status(1, idle=idle), 1.7)
    assert "100%" in said
    assert "3 engines wait" in said


def test_durations_and_counts_are_short() -> None:
    assert (duration(0), duration(59.9), duration(3600)) == ("0:00", "0:59", "1:00:00")
    assert (count(0), count(999), count(1_000), count(2.5e9)) == ("0", "999", "1.0k", "2.5G")
