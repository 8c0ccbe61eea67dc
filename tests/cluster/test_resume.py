"""Runs that are stopped or cut off, and go on."""

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from millrace.cluster import config as configs
from millrace.cluster import jobs, snapshot
from millrace.cluster.cli import main
from millrace.cluster.plan import make_plan
from millrace.cluster.run import Run
from millrace.cluster.spawn import here
from millrace.core.errors import ConfigError
from millrace.learner.table_model import TableForCausalLM
from tests.records import records

STEPS, PER_STEP = 10, 16


def silent(line: str) -> None:
    """Nothing is said in tests."""


def cut(config: Any, *, after: int, orderly: bool) -> Any:
    """Begin a run and end it when so many steps are made: by `stop`, or as a crash would, without a commit."""
    plan = make_plan(config)
    jobs._prepare(plan, resume=False)

    async def begin() -> Any:
        run = Run(plan, spawn=here, resume=False, say=silent)
        task = asyncio.ensure_future(run.execute())
        while run._supervisor is None or len(await run._supervisor["learner"].reports(after=0)) < after:
            await asyncio.sleep(0.002)
            assert not task.done()
        if orderly:
            await run.stop()
            return await task
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return None

    return asyncio.run(begin())


def go_on(config: Any) -> Any:
    return jobs.train(configs.of_directory(config.directory), local=True, resume=True, say=silent)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def step_rows(config: Any) -> list[dict[str, Any]]:
    return [row for row in lines(config.directory / "metrics.jsonl") if "held_out" not in row]


def trained_draws(config: Any) -> tuple[Counter[int], list[int]]:
    """Of the surviving history: how often each draw was trained, by the ledger's records; and all versions given."""
    taken: dict[int, dict[int, int]] = {}  # step -> draw -> attempt
    trained: set[int] = set()
    versions = []
    for record in records(config.directory):
        if record["op"] == "took":
            taken.setdefault(record["step"], {}).update({row[0]: row[1] for row in record["rows"]})
        elif record["op"] == "trained":
            trained.add(record["step"])
        elif record["op"] == "rejoined":
            trained = {step for step in trained if step < record["step"]}
        elif record["op"] == "lost":
            for draw, _ in record["rows"]:
                for batch in taken.values():
                    batch.pop(draw, None)
        if "version" in record and record["op"] in ("trained", "rejoined"):
            versions.append(record["version"])
    return Counter(draw for step in trained for draw in taken[step]), versions


@pytest.mark.parametrize("orderly", [True, False], ids=["stopped", "cut off"])
@pytest.mark.parametrize("max_lag", [0, 2])
def test_a_run_goes_on_from_its_last_commit(make_run: Any, max_lag: int, orderly: bool) -> None:
    config = make_run(loop={"steps": STEPS, "max_lag": max_lag}, learner={"checkpoint_every": 3})
    first = cut(config, after=5, orderly=orderly)
    if orderly:
        assert first["ended"] == "stopped"
        assert 5 <= first["steps"] < STEPS
        assert Path(first["checkpoint"]).name == f"step_{first['steps']}.1"
        assert first["draws"]["committed"] == first["steps"] * PER_STEP
        assert (config.directory / "model" / "model.safetensors").is_file()
    else:
        assert lines(config.directory / "events.jsonl")[-1]["kind"] == "interrupted"
        assert not (config.directory / "result.json").exists()
    before = step_rows(config)
    found = go_on(config)

    assert (found["ended"], found["steps"]) == ("finished", STEPS)
    draws, versions = trained_draws(config)
    assert sum(draws.values()) == len(draws) == STEPS * PER_STEP == found["draws"]["committed"]
    assert len(versions) == len(set(versions))
    rows = step_rows(config)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    committed = first["steps"] if orderly else next(i for i, row in enumerate(rows) if row not in before)
    assert committed >= 3
    assert rows[:committed] == before[:committed]
    assert min(row["version"] for row in rows[committed:]) > max(row["version"] for row in before)
    events = [event["kind"] for event in lines(config.directory / "events.jsonl")]
    assert events.count("started") == events.count("resumed") == 1


def test_the_result_of_a_resumed_run_is_that_of_the_whole(make_run: Any) -> None:
    config = make_run(loop={"steps": STEPS}, learner={"checkpoint_every": 3})
    first = cut(config, after=5, orderly=True)
    found = go_on(config)
    rows = step_rows(config)
    assert found["reward"] == {"first": first["reward"]["first"], "last": rows[-1]["reward/mean"]}
    assert found["samples"] == sum(found["lag_histogram"].values()) == STEPS * PER_STEP * 8
    assert found["seconds"] > first["seconds"]
    assert found["throughput"]["samples_per_s"] * found["seconds"] == pytest.approx(found["samples"])
    waste = dict(found["waste"])
    assert waste.pop("generated") == sum(waste.values())
    assert waste["unaccounted"] == 0
    evaluated = [each["step"] for each in found["held_out"]["all"]]
    assert evaluated == sorted(set(evaluated))
    assert {0, 4, 8, STEPS} == set(evaluated)
    assert found["held_out"]["first"] == first["held_out"]["first"]
    assert found["held_out"]["last"]["mean"] > 0.8
    model = TableForCausalLM.from_pretrained(config.directory / "model")
    assert model.table.equal(AutoModelForCausalLM.from_pretrained(found["checkpoint"]).table)


def test_weights_that_were_evaluated_before_are_not_evaluated_again(make_run: Any) -> None:
    config = make_run(loop={"steps": STEPS}, evaluation={"every": 1})
    first = cut(config, after=4, orderly=True)
    found = go_on(config)
    assert [each["step"] for each in found["held_out"]["all"]] == list(range(STEPS + 1))
    assert found["held_out"]["all"][: first["steps"] + 1] == first["held_out"]["all"]


def weights(config: Any) -> bytes:
    return (config.directory / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("orderly", [True, False], ids=["stopped", "cut off"])
def test_a_synchronous_run_that_was_interrupted_ends_as_if_it_had_not_been(make_run: Any, orderly: bool) -> None:
    """To the bit."""
    learner = {"schedule": "cosine", "decay_steps": 8, "checkpoint_every": 2}
    sizes = {"loop": {"steps": 8, "max_lag": 0}, "learner": learner}
    whole, halves = make_run("whole", **sizes), make_run("halves", **sizes)
    jobs.train(whole, local=True, say=silent)
    cut(halves, after=3, orderly=orderly)
    go_on(halves)
    assert weights(whole) == weights(halves)
    assert [row["weights"] for row in step_rows(halves)] == [row["weights"] for row in step_rows(whole)]
    assert [row["reward/mean"] for row in step_rows(halves)] == [row["reward/mean"] for row in step_rows(whole)]


def test_a_torn_last_row_is_left_out(make_run: Any) -> None:
    config = make_run(loop={"steps": 6})
    cut(config, after=2, orderly=True)
    with (config.directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "rew')
    go_on(config)
    assert [row["step"] for row in step_rows(config)] == list(range(1, 7))


def test_a_run_that_is_stopped_before_it_began_goes_on(make_run: Any) -> None:
    config = make_run(loop={"steps": 3})
    plan = make_plan(config)
    jobs._prepare(plan, resume=False)

    async def begin() -> Any:
        run = Run(plan, spawn=here, resume=False, say=silent)
        await run.stop()
        return await run.execute()

    first = asyncio.run(begin())
    assert (first["ended"], first["steps"], first["reward"], first["checkpoint"]) == ("stopped", 0, None, None)
    found = go_on(config)
    assert (found["ended"], found["steps"], found["samples"]) == ("finished", 3, 3 * PER_STEP * 8)
    assert [each["step"] for each in found["held_out"]["all"]] == [0, 3]


def test_resuming_a_finished_run_says_so_and_changes_nothing(make_run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_run(loop={"steps": 2})
    found = jobs.train(config, local=True, say=silent)
    before = {path: path.stat().st_mtime_ns for path in config.directory.rglob("*")}
    main(["train", "--resume", str(config.directory), "--local"])
    said = capsys.readouterr().out
    assert f"{config.directory} is finished: all of its 2 steps are made" in said
    assert "finished after 2 steps" in said
    assert go_on(config) == found
    assert {path: path.stat().st_mtime_ns for path in config.directory.rglob("*")} == before


def test_a_supervised_run_cannot_be_resumed(make_run: Any) -> None:
    config = make_run(recipe="sft")
    config.directory.mkdir(parents=True)
    configs.save(config, config.directory / "config.toml")
    with pytest.raises(ConfigError, match="recipe sft commits nothing until it is done.*remove the directory"):
        go_on(config)


def test_a_directory_that_was_moved_is_not_resumed_elsewhere(
    make_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_run()
    config.directory.mkdir(parents=True)
    configs.save(config, config.directory / "config.toml")
    moved = config.directory.rename(tmp_path / "moved")
    with pytest.raises(SystemExit) as ended:
        main(["train", "--resume", str(moved), "--local"])
    assert ended.value.code == 2
    assert f"{moved} was moved: its config.toml says {config.directory}" in capsys.readouterr().err
    assert not config.directory.exists()


def test_a_resumed_run_that_ends_before_it_begins_still_says_what_is_committed(make_run: Any) -> None:
    config = make_run(loop={"steps": STEPS}, learner={"checkpoint_every": 3})
    cut(config, after=5, orderly=True)
    before = snapshot.read(config.directory)
    assert before is not None and before.committed_step >= 5
    with jobs.ready(configs.of_directory(config.directory), resume=True):
        now = snapshot.read(config.directory)
    assert now is not None and now.state == "starting"
    assert (now.step, now.committed_step, now.held_out) == (before.step, before.committed_step, before.held_out)
