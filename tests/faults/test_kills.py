"""Rows of the fault matrix in which a process dies, or stands still. Real Ray; real vLLM where an engine dies alone."""

import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from examples import tiny_model
from millrace.core.replay.draws import State
from tests.conftest import write_rows
from tests.faults import invariants, rewards
from tests.faults.harness import Ended, Hit, Scene
from tests.faults.invariants import History
from tests.faults.leaks import nothing_left

pytestmark = pytest.mark.ray

KINDS = ["generation-0", "reward-0", "learner", "queue", "weights", "held-out"]
EVALUATED = {"every": 2, "samples": 1}
POISON_ID = "train:35"  # 3=4
SEED = 0


@pytest.fixture(autouse=True)
def _leaves_nothing() -> Iterator[None]:
    """I5, of every test here."""
    with nothing_left():
        yield


def committed(found: History) -> int:
    return found.states()[State.COMMITTED]


def made_once(found: History) -> None:
    """No group that was accepted was generated again."""
    again = sorted(draw for draw, many in Counter(draw for draw, _ in found.runs).items() if many > 1)
    assert not again, f"draws that were generated again: {again}"


def test_a_run_survives_the_kill_of_each_of_its_processes(paced_run: Any, copy_task: dict[str, Path]) -> None:
    """One after the other in one run; no draw is lost, none trained twice."""
    config = paced_run(
        loop={"steps": 150},
        data={"held_out": str(copy_task["held_out"])},
        evaluation=EVALUATED,
    )
    hits = []
    with Scene.start(config) as scene:
        scene.until(step=2)
        for kind in KINDS:
            hits.append(scene.kill(kind))
            scene.back(hits[-1])
        ended = scene.end()
    found = invariants.hold(ended, hits=hits)
    assert ended.result is not None
    assert committed(found) == 150 * 8 == ended.result["draws"]["committed"]
    assert ended.status.incidents == len(ended.result["incidents"]) == len(KINDS)
    assert set(ended.result["recovery_s"]) == {"generation", "reward", "learner", "queue", "weights", "held-out"}


@pytest.mark.faults
@pytest.mark.parametrize(
    ("at", "sections", "workers"),
    [
        pytest.param("generation.generate.before@9", {}, 1, id="prefill"),
        pytest.param("generation.generate.before@9", {}, 2, id="prefill, one of two"),
        pytest.param("", {}, 1, id="decode"),
        pytest.param("", {}, 2, id="decode, one of two"),
        pytest.param("", {"loop": {"max_lag": 0}, "generation": {"engine": "table"}}, 1, id="idle"),
        pytest.param("generation.put.before@5", {}, 1, id="a finished group in hand"),
        pytest.param("weights.load.before@3", {}, 1, id="weight update"),
        pytest.param("weights.load.before@1", {}, 2, id="first weights, one of two"),
    ],
)
def test_a_generation_worker_that_is_killed_comes_back_and_its_draws_go_to_others(
    paced_run: Any, at: str, sections: dict[str, Any], workers: int
) -> None:
    generation = {**sections.get("generation", {}), "workers": workers}
    config = paced_run(**{**sections, "generation": generation})
    with Scene.start(config, at=f"{at}=kill" if at else "") as scene:
        if at:
            hit = scene.reached("generation")
        else:
            scene.until(step=3)
            hit = scene.kill("generation-0")
        scene.back(hit)
        ended = scene.end()
    found = invariants.hold(ended, hits=[hit])
    assert committed(found) == 60 * 8
    crashed = {tuple(row[:2]) for each in found.records if each["op"] == "failed" for row in each["rows"]}
    for draw, attempt in crashed:  # begun anew as a whole: tokens of two processes are never mixed
        assert (draw, attempt) not in found.runs and (draw, attempt + 1) in found.runs


@pytest.mark.faults
@pytest.mark.parametrize("at", ["", "reward.put.before@4"], ids=["judging", "judged, not put"])
def test_what_a_killed_judge_held_is_judged_again_and_not_generated_again(paced_run: Any, at: str) -> None:
    with Scene.start(paced_run(), at=f"{at}=kill" if at else "") as scene:
        if at:
            hit = scene.reached("reward")
        else:
            scene.until(step=3)
            scene.until(lambda status: status.draws.get("judging", 0) > 0, what="a group to be judged")
            hit = scene.kill("reward-0")
        scene.back(hit)
        ended = scene.end()
    found = invariants.hold(ended, hits=[hit])
    assert committed(found) == 60 * 8
    made_once(found)


@pytest.mark.faults
@pytest.mark.parametrize(
    "at",
    [
        "journal.store.before@5",
        "journal.store.torn@5",
        "journal.store.after@5",
        "journal.flush.before@40",
        "journal.flush.after@40",
    ],
)
def test_a_queue_that_is_killed_while_it_writes_loses_nothing_that_it_accepted(paced_run: Any, at: str) -> None:
    with Scene.start(paced_run(), at=f"{at}=kill") as scene:
        hit = scene.reached("queue")
        scene.back(hit)
        ended = scene.end()
    found = invariants.hold(ended, hits=[hit])
    assert committed(found) == 60 * 8
    made_once(found)  # producers repeated what was not acknowledged


@pytest.mark.faults
@pytest.mark.parametrize(
    ("at", "component"),
    [
        ("learner.step.before@4", "learner"),
        ("learner.step.after@4", "learner"),
        ("learner.checkpoint.write@2", "learner"),
        ("learner.commit.before@2", "learner"),
        ("learner.commit.after@2", "learner"),
        ("weights.publish.half@4", "weights"),
    ],
)
def test_steps_after_the_last_commit_are_redone_with_the_same_batches(paced_run: Any, at: str, component: str) -> None:
    with Scene.start(paced_run(learner={"checkpoint_every": 3}), at=f"{at}=kill") as scene:
        hit = scene.reached(component)
        scene.back(hit)
        ended = scene.end()
    found = invariants.hold(ended, hits=[hit])
    assert committed(found) == 60 * 8
    # What versions of the dead branch sampled may be beyond the bound in the surviving one, and is then begun anew.
    given_up = {row[0] for each in found.records if each["op"] == "stale" for row in each["rows"]}
    assert {draw for draw, attempt in found.runs if attempt > 0} <= given_up
    taken: dict[int, set[tuple[int, int]]] = {}
    for record in found.records:
        if record["op"] == "took":
            taken.setdefault(record["step"], set()).update((row[0], row[1]) for row in record["rows"])
    for step, groups in found.trained.items():
        assert set(groups) == taken[step], f"step {step} was redone with other groups than were recorded"


@pytest.mark.faults
def test_each_process_that_is_stopped_is_noticed_and_replaced(paced_run: Any, copy_task: dict[str, Path]) -> None:
    """SIGSTOP, which Ray never notices. What wakes up afterwards has been ended already."""
    config = paced_run(loop={"steps": 200}, data={"held_out": str(copy_task["held_out"])}, evaluation=EVALUATED)
    hits = []
    with Scene.start(config) as scene:
        scene.until(step=2)
        for kind in KINDS:
            hits.append(scene.stop(kind))
            scene.lost(hits[-1])
            scene.cont(hits[-1])
            scene.back(hits[-1])
        ended = scene.end()
    found = invariants.hold(ended, hits=hits)
    assert committed(found) == 200 * 8
    assert all("SIGSTOP" in each["cause"] for each in ended.told("lost"))


@pytest.mark.faults
def test_a_short_pause_restarts_nobody(paced_run: Any) -> None:
    """Each kind stands still for half the time that would count as a hang, one after the other."""
    with Scene.start(paced_run(loop={"steps": 100})) as scene:
        scene.until(step=2)
        for kind in KINDS[:-1]:
            hit = scene.stop(kind)
            time.sleep(4)
            scene.cont(hit)
            at = scene.job.status().step
            scene.until(step=at + 2)
        ended = scene.end()
    found = invariants.hold(ended)
    assert committed(found) == 100 * 8
    assert not ended.told("lost") and ended.status.incidents == 0


@pytest.mark.faults
def test_what_a_paused_worker_sends_too_late_is_refused(paced_run: Any) -> None:
    """Its leases ended while it stood still, and its draws went to the other one."""
    config = paced_run(
        loop={"steps": 25, "start_s": 2.0, "lease_s": 2.0},
        # So slow that both always have draws in hand.
        generation={"workers": 2, "slots": 16, "engine": {"name": "table", "token_delay_s": 0.2, "chunk_tokens": 1}},
        supervise={"hang_s": 60.0, "busy_s": 60.0},
    )
    with Scene.start(config) as scene:
        scene.until(step=2)
        hit = scene.stop("generation-0")
        time.sleep(5)
        scene.cont(hit)
        at = scene.job.status().step
        scene.until(step=at + 3)
        ended = scene.end()
    found = invariants.hold(ended)
    assert committed(found) == 25 * 8
    assert any(record["op"] == "failed" and record["cause"] == "expired" for record in found.records)
    assert not ended.told("lost")


def alone_in_quarantine(ended: Ended, worker: str, cause: str) -> None:
    """The one bad row is given up, none of its neighbours, and its crashes spent nothing of the worker's budget."""
    found = invariants.hold(ended, clean=False, kills=len(ended.told("lost")))
    told = ended.told("quarantined")
    assert [each["prompt"] for each in told] == [POISON_ID]  # the run is one epoch long
    assert found.in_state(State.DEAD) == {told[0]["draw"]}
    assert (told[0]["cause"], told[0]["times"]) == (cause, 3)
    assert set(told[0]["workers"]) == {worker}
    assert not ended.told("given up")


ONE_EPOCH = {"steps": 9, "crashes": 3}  # 72 draws of 80 rows, and what takes the place of the bad one
FEW = {"backoff_s": 0.1, "backoff_most_s": 0.5, "restarts": 4}


@pytest.mark.faults
@pytest.mark.parametrize(
    ("function", "cause"),
    [
        (rewards.kills_its_process, "judge_crashed"),
        (rewards.segfaults, "judge_crashed"),
        (rewards.holds_the_interpreter, "judge_crashed"),
    ],
    ids=["SIGKILL", "SIGSEGV", "hangs"],
)
def test_a_row_that_ends_the_judge_s_process_is_told_from_its_neighbours(
    paced_run: Any, function: Any, cause: str
) -> None:
    config = paced_run(
        seed=SEED,
        rewards={"verifier": rewards.named(function)},
        loop=ONE_EPOCH,
        supervise={**FEW, "hang_s": 3.0, "busy_s": 4.0},
    )
    with Scene.start(config) as scene:
        ended = scene.end()
    alone_in_quarantine(ended, "reward-0", cause)


@pytest.mark.faults
def test_a_prompt_that_ends_the_engine_s_process_is_told_from_its_neighbours(
    paced_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).with_name("poison")))
    with Scene.start(paced_run(seed=SEED, loop=ONE_EPOCH, supervise=FEW)) as scene:
        ended = scene.end()
    alone_in_quarantine(ended, "generation-0", "crashed")


def vllm_run(tmp_path: Path, make_run: Any) -> Any:
    tiny_model.build(tmp_path / "llama")
    rows = [{"prompt": f"{a}={b}", "answer": str(b), "level": a} for a in range(10) for b in range(10)]
    return make_run(
        model=str(tmp_path / "llama"),
        data={"train": str(write_rows(tmp_path / "train.jsonl", rows))},
        generation={"engine": "vllm_async", "slots": 16, "check_wiring": False},
        learner={"learning_rate": 1e-3, "checkpoint_every": 2},
        loop={"steps": 30, "groups_per_step": 4},
        sampling={"max_tokens": 24},
    )


@pytest.mark.faults
@pytest.mark.parametrize("victim", ["EngineCore", ""], ids=["the engine's child alone", "the actor above it"])
def test_an_engine_with_processes_of_its_own_dies_as_one_and_comes_back(
    paced_run: Any, tmp_path: Path, victim: str
) -> None:
    with Scene.start(vllm_run(tmp_path, paced_run)) as scene:
        scene.until(step=3)
        actor = scene.serving("generation-0")
        child = scene.child("generation-0", "EngineCore")
        began = scene.send(signal.SIGKILL, "generation-0", child if victim else actor)
        hit = Hit("generation-0", actor, signal.SIGKILL, began.time_s)
        scene.back(hit)
        ended = scene.end()
    found = invariants.hold(ended, hits=[hit])
    assert committed(found) == 30 * 4
