"""The task is right, long-tailed, and its warm start is wrong as often as it says."""

import ast
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import long_tail_task


def test_answers_count_down() -> None:
    train, held_out = long_tail_task.rows()
    for row in (*train[:500], *held_out):
        letter, count = row["prompt"][0], int(row["prompt"][1:-1])
        items = row["answer"].split(" ")
        assert [int(item[1:]) for item in items] == list(range(count, 0, -1))
        assert {item[0] for item in items} == {letter}


def test_lengths_have_a_long_tail_and_fit() -> None:
    length_N = np.array([len(row["answer"]) + 1 for row in long_tail_task.rows()[0]])
    assert length_N.min() == 4
    assert length_N.max() == 120 < long_tail_task.MAX_TOKENS
    assert np.quantile(length_N, 0.99) >= 6 * np.median(length_N)


def test_no_held_out_prompt_is_trained() -> None:
    train, held_out = long_tail_task.rows()
    prompts = {row["prompt"] for row in held_out}
    assert len(prompts) == long_tail_task.HELD_OUT_ROWS
    trained = [row["prompt"] for row in (*train, *long_tail_task.warm_start(2000, wrong=0.5))]
    assert prompts.isdisjoint(trained)


def test_a_stated_share_of_the_warm_start_is_wrong_at_every_length() -> None:
    rows = list(long_tail_task.warm_start(4000, wrong=0.6))
    right = {row["prompt"]: row["answer"] for row in long_tail_task.warm_start(4000, wrong=0.0)}
    for short in (True, False):
        some = [row for row in rows if (len(right[row["prompt"]]) < 30) is short]
        wrong = [long_tail_task.score(row["answer"], right[row["prompt"]]) == 0 for row in some]
        assert np.mean(wrong) == pytest.approx(0.6, abs=0.04)


def test_the_task_needs_the_standard_library_only() -> None:
    tree = ast.parse(Path(long_tail_task.__file__).read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} <= sys.stdlib_module_names
