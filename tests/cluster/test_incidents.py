"""Incidents out of events: each loss once, with its own way back."""

from pathlib import Path
from typing import Any

from millrace.cluster.incidents import incidents, quarantined, read, recovery_s


def event(time_s: float, kind: str, component: str = "", **facts: Any) -> dict[str, Any]:
    return {"time_s": time_s, "kind": kind, "component": component, **facts}


def test_each_loss_is_paired_with_the_next_time_that_the_component_served() -> None:
    found = incidents(
        [
            event(0, "started"),
            event(0.5, "serving", "queue", pid=1),  # for the first time
            event(1, "lost", "generation-0", cause="signal 9"),
            event(2, "lost", "generation-1", cause="hung"),
            event(3, "restarting", "generation-0", in_s=0.5),
            event(4, "serving", "generation-0", down_s=2.5),
            event(5, "lost", "generation-0", cause="signal 11"),
            event(8, "serving", "generation-0"),
            event(9, "given up", "generation-1", cause="hung"),
        ]
    )
    assert [(each.component, each.cause, each.down_s, each.given_up) for each in found] == [
        ("generation-0", "signal 9", 2.5, False),
        ("generation-1", "hung", None, True),
        ("generation-0", "signal 11", 3.0, False),
    ]
    assert recovery_s(found) == {"generation": [2.5, 3.0]}
    assert str(found[0]) == "generation-0 was lost: signal 9; back after 2.5 s"
    assert str(found[1]) == "generation-1 was lost: hung; given up"


def test_one_that_is_lost_again_before_it_served_is_down_since_the_first_time() -> None:
    found = incidents(
        [
            event(1, "lost", "generation-0", cause="signal 9"),
            event(3, "lost", "generation-0", cause="no memory"),
            event(9, "serving", "generation-0", down_s=8.0),
        ]
    )
    assert [(each.cause, each.down_s) for each in found] == [("signal 9", None), ("no memory", 8.0)]


def test_what_an_ended_incarnation_left_down_does_not_come_back_in_the_next() -> None:
    found = incidents(
        [
            event(1, "lost", "learner", cause="signal 9"),
            event(2, "failed", cause="gone"),
            event(900, "resumed"),
            event(901, "serving", "learner"),
        ]
    )
    assert [each.down_s for each in found] == [None]


def test_a_draw_that_was_given_up_again_after_a_resume_is_told_once() -> None:
    first = event(1, "quarantined", draw=3, attempt=2, prompt="a", cause="crashed", traceback="T")
    found = quarantined([first, event(2, "resumed"), {**first, "time_s": 3}, {**first, "draw": 4, "prompt": "b"}])
    assert [(each["draw"], each["prompt"]) for each in found] == [(3, "a"), (4, "b")]
    assert not any("traceback" in each for each in found)


def test_a_line_that_was_torn_by_a_kill_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    assert read(path) == []
    path.write_text('{"time_s": 1, "kind": "started"}\n{"time_s": 2, "ki{"time_s": 3, "kind": "resumed"}\n{"time')
    assert [each["kind"] for each in read(path)] == ["started"]
