"""Rows of the fault matrix that are the data's, the judges' and the rates' fault. Whole runs in this process."""

import asyncio
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from millrace.actors.engines.table import TableEngine
from millrace.cluster import jobs
from millrace.core.errors import DataBudgetError, DataError, DeadlineError, EngineError, TrainingError
from millrace.core.replay.draws import State
from millrace.core.replay.queue import ReplayQueue
from tests.faults import invariants, rewards
from tests.faults.harness import Ended, Row, run_here

Sections = dict[str, Any]


def judged_by(function: Any, **settings: Any) -> Sections:
    return {"verifier": rewards.named(function), **settings}


def quarantined(ended: Ended) -> list[Row]:
    """What events.jsonl and result.json say of prompts that were given up; they agree."""
    told = ended.told("quarantined")
    if ended.result is not None:
        assert [each["draw"] for each in ended.result["quarantined"]] == [each["draw"] for each in told]
        assert not any("traceback" in each for each in ended.result["quarantined"])
        assert ended.status.quarantined == len(told)
    return told


def poison_is_told(ended: Ended, found: invariants.History, *causes: str) -> None:
    """Every draw of the one bad row is dead, all others are trained, and the event says why."""
    told = quarantined(ended)
    assert {each["draw"] for each in told} == found.in_state(State.DEAD)
    assert 1 <= len(told) <= 3  # the row is drawn once in an epoch
    for each in told:
        assert each["prompt"] == "train:35"  # 3=4
        for cause in causes:
            assert cause in each["cause"] + each["traceback"], each


def test_a_slow_reward_delays_and_drops_nothing(make_run: Any) -> None:
    ended = run_here(make_run(rewards=judged_by(rewards.slow)))
    found = invariants.hold(ended)
    assert found.states() == {State.COMMITTED: 20 * 8}
    assert ended.result is not None and ended.result["invalid_rollouts"] == 0


@pytest.mark.parametrize(
    ("function", "settings", "cause"),
    [
        (rewards.hangs_on_one, {"deadline_s": 0.3}, "took longer than rewards.deadline_s = 0.3"),
        (rewards.raises_on_one, {}, 'raise ValueError("this row has no answer")'),
    ],
    ids=["hangs", "raises"],
)
def test_a_row_that_cannot_be_judged_is_quarantined_and_the_run_goes_on(
    make_run: Any, function: Any, settings: Sections, cause: str
) -> None:
    ended = run_here(make_run(rewards=judged_by(function, **settings), learner={"learning_rate": 0.1}))
    found = invariants.hold(ended, clean=False)
    poison_is_told(ended, found, f"reward function {rewards.named(function)}", cause)


def test_values_that_are_no_score_are_masked_and_never_a_zero(make_run: Any) -> None:
    ended = run_here(make_run(rewards=judged_by(rewards.bad_values), loop={"judge_retries": 0}))
    invariants.hold(ended, clean=False)
    assert ended.result is not None
    assert ended.result["invalid_rollouts"] > 0
    assert {row["reward/mean"] for row in ended.steps} == {0.5}  # a zero among them would pull it down
    assert {row["reward/std"] for row in ended.steps} == {0.0}
    assert ended.result["waste"]["masked"] > 0


def test_a_prompt_that_the_engine_fails_on_is_quarantined_and_the_engine_lives(
    make_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = TableEngine.sample
    calls = []

    async def picky(self: Any, tokens_P: Any, **options: Any) -> Any:
        if tokens_P.tolist()[0] == 7 and tokens_P.tolist()[2] == 8:  # 3=4, four special tokens before the digits
            calls.append(options["key"])
            raise EngineError("out of memory")
        return await sample(self, tokens_P, **options)

    monkeypatch.setattr(TableEngine, "sample", picky)
    ended = run_here(make_run(loop={"attempts": 3}))
    found = invariants.hold(ended, clean=False)
    poison_is_told(ended, found, "out of memory", "in picky")
    assert len(calls) == 3 * len(found.in_state(State.DEAD))
    assert not ended.told("lost") and not ended.told("restarting")  # the infrastructure's budget is untouched


def test_too_many_bad_rows_end_the_run_with_their_names(make_run: Any) -> None:
    config = make_run(
        rewards=judged_by(rewards.raises_on_half, max_judge_failures=10**6),
        loop={"steps": 10**4, "max_dead": 5, "judge_retries": 0, "attempts": 1},
    )
    with pytest.raises(DataBudgetError) as caught:
        jobs.train(config, local=True, say=lambda line: None)
    said = str(caught.value)
    assert "loop.max_dead = 5" in said and "train:" in said and "judge" in said and "--resume" in said
    assert len(said.splitlines()) <= invariants.LINES
    ended = Ended.of(config.directory)
    assert ended.status.state == "failed" and ended.told("failed")[-1]["cause"] == said
    assert quarantined(ended) and all("odd levels have no answer" in each["traceback"] for each in quarantined(ended))
    invariants.hold(ended, whole=False, clean=False)


def test_groups_without_variance_are_not_drawn_for_ever(make_run: Any) -> None:
    config = make_run(rewards={**judged_by(rewards.half), "filters": ["zero_variance"]}, learner={"max_filtered": 3})
    with pytest.raises(TrainingError, match=r"(?s)max_filtered = 3 batches.*zero_variance.*raise learner.max_filtered"):
        jobs.train(config, local=True, say=lambda line: None)
    found = invariants.hold(Ended.of(config.directory), whole=False, clean=False)
    assert len(found.in_state(State.FILTERED)) >= 3 * 8
    assert found.next_draw <= (3 + 2) * 8 + config.loop.capacity


def write(path: Path, rows: Sequence[Row]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("rows", "cause"),
    [
        ([], "the dataset is empty"),
        ([{"prompt": "1=2", "answer": "2"}, {"prompt": "", "answer": "2"}], "line 2.*prompt"),
        ([{"prompt": "1=2", "answer": "2"}, {"prompt": "1" * 300, "answer": "2"}], "line 2.*tokens"),
    ],
    ids=["empty", "an empty prompt", "a prompt that is too long"],
)
def test_data_that_cannot_work_are_refused_before_anything_starts(
    make_run: Any, tmp_path: Path, rows: Sequence[Row], cause: str
) -> None:
    config = make_run(data={"train": write(tmp_path / "rows.jsonl", rows)}, generation={"context": 64})
    with pytest.raises(DataError, match=cause):
        jobs.train(config, local=True, say=lambda line: None)
    assert not config.directory.exists()


def test_a_data_set_shorter_than_a_batch_is_drawn_again_and_again(make_run: Any, tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}={n}", "answer": str(n), "level": n} for n in range(3)]
    ended = run_here(make_run(data={"train": write(tmp_path / "rows.jsonl", rows)}, loop={"steps": 9}))
    assert invariants.hold(ended).states() == {State.COMMITTED: 72}  # each row 24 times


def slowed(monkeypatch: pytest.MonkeyPatch, method: str, pause_s: float) -> None:
    """A method of the queue that answers late."""
    answer = getattr(ReplayQueue, method)

    async def late(self: Any, *args: Any, **options: Any) -> Any:
        await asyncio.sleep(pause_s)
        return await answer(self, *args, **options)

    monkeypatch.setattr(ReplayQueue, method, late)


@pytest.mark.parametrize("who", ["trainer", "engines", "judges"])
def test_whoever_is_slow_holds_the_others_back_and_nothing_is_dropped(
    make_run: Any, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    """Back-pressure: never more draws alive than there are places, every one trained, none long after its turn."""
    generation: Sections = {"workers": 2}
    if who == "engines":
        generation["engine"] = {"name": "table", "token_delay_s": 0.02, "chunk_tokens": 1}
    else:
        slowed(monkeypatch, {"trainer": "trained", "judges": "put_verdicts"}[who], 0.1)
    config = make_run(generation=generation, loop={"steps": 12})
    ended = run_here(config)
    found = invariants.hold(ended)
    assert found.states() == {State.COMMITTED: 12 * 8}
    assert found.most_alive <= config.loop.capacity
    if who == "trainer":
        assert found.most_alive == config.loop.capacity  # it was full, and nobody overran it
    for step, groups in found.trained.items():
        turns = [draw // 8 for draw, _ in groups]
        assert max(abs(turn - step) for turn in turns) <= config.loop.max_lag, f"step {step} trained turns {turns}"
    assert ended.result is not None
    assert ended.result["waste"]["generated"] == ended.result["waste"]["trained"]


def test_a_clock_that_jumps_by_an_hour_changes_nothing(make_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases, deadlines and rates are counted by clocks that only go forwards."""
    wall, calls = time.time, 0

    def jumping() -> float:
        nonlocal calls
        calls += 1
        return wall() + (0, 3600, -3600)[calls // 20 % 3]

    monkeypatch.setattr(time, "time", jumping)
    ended = run_here(
        make_run(rewards={"deadline_s": 5.0}, loop={"start_s": 20.0, "lease_s": 20.0, "judge_lease_s": 20.0})
    )
    assert calls > 60
    found = invariants.hold(ended)
    assert found.states() == {State.COMMITTED: 20 * 8}
    assert ended.result is not None
    assert not [row for row in ended.result["waste"] if row.startswith("failed")]
    assert 0 < ended.result["seconds"] < 600
    assert not ended.told("lost") and not ended.told("stalled")


def test_a_run_that_stands_still_says_what_everything_waits_for(make_run: Any) -> None:
    config = make_run(stall_report_s=0.3, stall_s=2.0, loop={"max_lag": 0}, rewards=judged_by(rewards.never))
    with pytest.raises(DeadlineError, match="stall_s = 2"):
        jobs.train(config, local=True, say=lambda line: None)
    told = Ended.of(config.directory).told("stalled")
    assert told
    for part in ("draw ", "attempt 0", "train:", "reward-0"):
        assert part in told[0]["why"], told[0]["why"]
    assert len(told[0]["why"].splitlines()) <= invariants.LINES
