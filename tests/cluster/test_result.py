"""What result.json is made of."""

import json
from pathlib import Path
from typing import Any

from millrace.cluster.conclude import export
from millrace.cluster.plan import make_plan
from millrace.cluster.record import Recorder
from millrace.cluster.result import packages, result, row, shares
from millrace.core.protocols import QueueStatus
from millrace.learner.report import LagNumbers, StepNumbers, StepReport


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
        "idle_s": {"data": 0.25, "judge": 0.125, "weights": 0.0, "scheduler": 0.125},
        "weights": f"digest {step}",
    }
    return StepReport(**{**facts, **changes})


def found(make_run: Any, reports: list[StepReport], **changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "ended": "finished",
        "rows": [row(each, tokens={"generated": 10, "trained": 8}) for each in reports],
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
        "computing": 0.5,
        "data": 0.125,
        "judge": 0.0625,
        "weights": 0.0,
        "scheduler": 0.0625,
        "publishing": 0.125,
        "checkpoints": 0.0625,
        "other": 0.0625,
    }


def test_a_row_has_what_was_waited_for_and_which_weights_came_of_it() -> None:
    made = row(report(3), tokens={})
    assert {name: made[name] for name in made if name.startswith("idle/")} == {
        "idle/data_s": 0.25,
        "idle/judge_s": 0.125,
        "idle/weights_s": 0.0,
        "idle/scheduler_s": 0.125,
    }
    assert made["weights"] == "digest 3"


def test_what_was_lost_and_given_up_is_in_the_result(make_run: Any) -> None:
    events = [
        {"time_s": 10.0, "kind": "lost", "component": "generation-0", "cause": "signal 9"},
        {"time_s": 12.0, "kind": "serving", "component": "generation-0", "down_s": 1.5},
        {"time_s": 20.0, "kind": "lost", "component": "held-out", "cause": "signal 9"},
        {"time_s": 21.0, "kind": "quarantined", "draw": 7, "attempt": 2, "prompt": "p", "traceback": "long"},
    ]
    made = found(make_run, [report(1)], events=events)
    assert [(each["component"], each["cause"], each["down_s"]) for each in made["incidents"]] == [
        ("generation-0", "signal 9", 1.5),
        ("held-out", "signal 9", None),
    ]
    assert made["recovery_s"] == {"generation": [1.5]}
    assert made["quarantined"] == [{"draw": 7, "attempt": 2, "prompt": "p"}]
    json.dumps(made, allow_nan=False)


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
