"""What a profile is made of."""

from collections import Counter

import pytest

from benchmarks import profile_run, ray_calls


def test_lines_of_one_function_belong_together_and_recursion_counts_once() -> None:
    found = profile_run.functions(
        [
            "run (millrace/actors/engines/pump.py:180);step (vllm/core.py:10) 6",
            "run (millrace/actors/engines/pump.py:190);step (vllm/core.py:12);step (vllm/core.py:12) 3",
            "idle (x.py:1) 1",
            "",
        ]
    )
    assert found.samples == 10
    assert found.own == Counter({"step (vllm/core.py)": 9, "idle (x.py)": 1})
    assert found.within["run (engines/pump.py)"] == 9
    assert found.within["step (vllm/core.py)"] == 9


def test_cpu_seconds_are_of_the_window_alone() -> None:
    before = {1: ("driver", 10.0), 2: ("ray: raylet", 4.0), 3: ("gone", 1.0)}
    after = {1: ("driver", 11.0), 2: ("ray: raylet", 4.5), 4: ("ray: raylet", 0.25)}
    assert profile_run.cpu_table(before, after) == {"driver": 1.0, "ray: raylet": 0.75}


def test_calls_are_told_per_trained_rollout() -> None:
    rows = profile_run.call_table(
        {"queue": {"take": 2, "status": 6}, "weights": {"publish": 2}},
        {"queue": {"take": (20, 1980), "status": (0, 600)}, "weights": {"publish": (4000, 0)}},
        200,
    )
    assert [row["method"] for row in rows] == ["queue.status", "weights.publish", "queue.take"]
    assert [row["calls_per_rollout"] for row in rows] == [0.03, 0.01, 0.01]
    assert rows[2]["bytes_per_call"] == 1000 and rows[2]["bytes_per_rollout"] == 10


@pytest.mark.parametrize("value", [b"x" * 5000, [b"y" * 2500, b"z" * 2500]])
def test_bytes_are_those_of_the_wire(value: object) -> None:
    assert 5000 <= ray_calls.pickled_bytes(value) < 5200
