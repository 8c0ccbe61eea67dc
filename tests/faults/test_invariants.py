"""The invariants find what they are for: each is shown one violation, made by hand."""

import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from millrace.cluster.config import RunConfig
from millrace.cluster.snapshot import Status
from millrace.core.replay.config import QueueConfig
from millrace.core.replay.draws import Draw, State
from millrace.core.replay.journal import Record
from tests.faults import invariants
from tests.faults.harness import Ended, Hit
from tests.faults.invariants import History

LOOP = QueueConfig(groups_per_step=2, group_size=1, steps=2, max_lag=1)
CONFIG = cast(
    RunConfig,
    SimpleNamespace(loop=LOOP, generation=SimpleNamespace(slots=2), sampling=SimpleNamespace(max_tokens=4)),
)
HIT = Hit("generation-0", 7, signal.SIGKILL, 100.0)


def records() -> list[Record]:
    """Two steps of two draws each, one commit."""
    found: list[Record] = []
    for step in (0, 1):
        rows = [(2 * step, 0), (2 * step + 1, 0)]
        found += [
            {"op": "rejoined", "step": 0, "version": 0} if step == 0 else {"op": "noted"},
            {"op": "announced", "version": step},
            {"op": "generated", "rows": [[*row, 4, [[[step, 0, 4]]], [0, row[0]]] for row in rows]},
            {"op": "took", "step": step, "rows": [[*row, [0], [0]] for row in rows]},
            {"op": "trained", "step": step, "version": step + 1},
        ]
    return [*found, {"op": "committed", "step": 2}]


def ledger(made: list[Record]) -> History:
    draws = {index: Draw(index, State.COMMITTED) for index in range(4)}
    rows = {"generated": 16, "trained": 16, "masked": 0, "in_flight": 0, "queued": 0, "unaccounted": 0}
    found = History(CONFIG, made, [], draws, 4, rows, 4)
    invariants._follow(found)
    return found


def run(**changes: Any) -> Ended:
    """A run in which generation-0 was killed at 100 and served again from 102 on."""
    events = [
        {
            "time_s": 100.5,
            "kind": "lost",
            "component": "generation-0",
            "pid": 7,
            "cause": "signal 9",
            "holds": ["draw 3"],
        },
        {"time_s": 100.6, "kind": "restarting", "component": "generation-0", "in_s": 0.1, "restart": 1, "of": 10},
        {"time_s": 102.0, "kind": "serving", "component": "generation-0", "pid": 8, "down_s": 1.5},
    ]
    said = ["step 1", "generation-0 (process 7) was lost: signal 9; draw 3 go to others; restart 1 of 10 in 0.1 s"]
    status = Status(id="runs/x", state="finished")
    ended = Ended(Path("/nowhere"), status, events, [{"step": 2, "time_s": 103.0}], said, None)
    return replace(ended, **changes)


def check(ended: Ended, found: History) -> None:
    invariants.one_state(found)
    invariants.trained_once(ended, found)
    invariants.nothing_lost(found)
    invariants.versions_are_right(found)
    invariants.books_close(ended, found)
    for each in (invariants.noticed, invariants.told, invariants.goes_on):
        cast(Callable[..., object], each)(ended, HIT)


def test_a_run_in_which_all_holds() -> None:
    check(run(), ledger(records()))


def without(made: list[Record], op: str) -> list[Record]:
    return [record for record in made if record["op"] != op]


def test_a_draw_that_is_in_two_committed_steps_is_found_at_the_commit() -> None:
    made = records()
    made[8]["rows"][0] = [0, 0, [1], [1]]  # step 1 takes draw 0 again
    with pytest.raises(AssertionError, match=r"draws in more committed steps than reuse = 1: \{0: 2\}"):
        ledger(made)


def test_a_step_that_is_undone_and_redone_is_trained_once() -> None:
    made = records()
    again = [{"op": "rejoined", "step": 0, "version": 5}, made[4] | {"version": 6}, made[9] | {"version": 7}]
    check(run(), ledger([*made[:-1], *again, made[-1]]))


@pytest.mark.parametrize(
    ("plant", "cause"),
    [
        (lambda found: found.draws.pop(2), "draws without a state"),
        (lambda found: setattr(found.draws[2], "state", State.LEASED), "the run is over, and these draws are not"),
        (lambda found: found.trained[1].pop(), "step 1 was trained with 1 groups"),
        (lambda found: setattr(found, "committed", 1), r"lost: \[2, 3\]"),
        (lambda found: found.announced.discard(1), "sampled by unknown weights"),
        (lambda found: found.runs[2, 0][0].__setitem__(0, [1, 1, 4]), r"\(2, 0\)"),
        (lambda found: found.runs[2, 0][0].append([0, 4, 5]), r"\(2, 0\)"),
        (lambda found: found.lags.__setitem__((1, 2, 0), [2]), "lags"),
        (lambda found: found.rows.update(trained=15), "16 generated tokens"),
        (lambda found: found.rows.update(trained=15, unaccounted=1), "unaccounted: 1"),
    ],
)
def test_what_is_wrong_in_the_ledger_is_found(plant: Callable[[History], object], cause: str) -> None:
    found = ledger(records())
    plant(found)
    with pytest.raises(AssertionError, match=cause):
        check(run(), found)


def changed(number: int, **facts: Any) -> dict[str, Any]:
    events = [dict(each) for each in run().events]
    events[number] |= facts
    return {"events": events}


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"events": []}, "nobody noticed what was done to generation-0"),
        (changed(0, time_s=103.5), "noticed after 3.5 s"),
        (changed(0, cause=""), "without a cause"),
        (changed(0, pid=9), "'pid': 9"),
        (changed(0, holds=["draw 5"]), "draw 5 is not named"),
        (changed(1, kind="noted"), "no restart was told"),
        (changed(2, kind="noted"), "did not come back"),
        ({"rows": [{"step": 2, "time_s": 101.0}]}, "no step ended after the recovery"),
        ({"said": []}, "no message says"),
        ({"said": ["generation-0 (process 7) was lost: signal 9; draw 3"]}, "nothing says what comes next"),
        ({"said": [run().said[1], *["  a frame"] * 20]}, "a frame"),
    ],
)
def test_what_is_wrong_in_what_was_told_is_found(changes: dict[str, Any], cause: str) -> None:
    with pytest.raises(AssertionError, match=cause):
        check(run(**changes), ledger(records()))
