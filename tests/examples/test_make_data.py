"""The example files are what the script writes, and their answers are right; warm-start answers are wrong as said."""

import importlib.util
import json
from collections import Counter, defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_data = script("make_data")
TASKS = sorted(make_data.TASKS)


def committed(task: str, part: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (EXAMPLES / task / f"{part}.jsonl").read_text().splitlines()]


def solution(task: str, prompt: str) -> str:
    """The right answer, found in another way than by the generator."""
    if task == "sorting":
        counts = Counter(prompt.removeprefix("sort ").removesuffix("="))
        return "".join(digit * counts[digit] for digit in "0123456789")
    return f"{eval(prompt[:2].lstrip('0') + '0' * (prompt[:2] == '00') + prompt[2] + str(int(prompt[3:5]))):02d}"


@pytest.mark.parametrize("task", TASKS)
def test_the_files_are_what_the_script_writes(task: str) -> None:
    train, held_out = make_data.rows(task)
    assert (committed(task, "train"), committed(task, "held_out")) == (train, held_out)
    assert (len(train), len(held_out)) == (2000, 200)


@pytest.mark.parametrize("task", TASKS)
def test_every_answer_is_right_and_no_prompt_stands_twice(task: str) -> None:
    rows = committed(task, "train") + committed(task, "held_out")
    assert [row["answer"] for row in rows] == [solution(task, row["prompt"]) for row in rows]
    assert len({row["prompt"] for row in rows}) == len(rows)


def test_the_files_are_small() -> None:
    assert sum(path.stat().st_size for path in EXAMPLES.rglob("*.jsonl")) < 400_000


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("wrong", "low", "high"), [(0.0, 0, 0), (0.5, 3800, 4200), (1.0, 7990, 8000)])
def test_warm_start_answers_are_wrong_for_the_stated_share(task: str, wrong: float, low: int, high: int) -> None:
    """Of 8,000 rows; at one half that is five standard deviations of 45. Five equal digits cannot be sorted wrongly."""
    rows = list(make_data.warm_start(task, 8000, wrong=wrong))
    assert len(rows) == 8000
    assert low <= sum(row["answer"] != solution(task, row["prompt"]) for row in rows) <= high


@pytest.mark.parametrize("task", TASKS)
def test_warm_start_never_shows_a_held_out_prompt(task: str) -> None:
    held_out = {row["prompt"] for row in committed(task, "held_out")}
    assert not held_out & {row["prompt"] for row in make_data.warm_start(task, 8000, wrong=0.5)}


@pytest.mark.parametrize("task", TASKS)
def test_warm_start_is_the_same_every_time(task: str) -> None:
    first, again = (list(make_data.warm_start(task, 500, wrong=0.5)) for _ in range(2))
    assert first == again


def test_the_warm_start_files_hold_both_tasks_and_their_stated_errors(tmp_path: Path) -> None:
    right, noisy = make_data.write_warm_start(tmp_path)
    for path, counts, wrong in (
        (right, make_data.RIGHT, dict.fromkeys(TASKS, 0.0)),
        (noisy, make_data.NOISY, make_data.WRONG),
    ):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(rows) == sum(counts.values())
        for task in TASKS:
            mine = [row for row in rows if row["prompt"].startswith("sort") == (task == "sorting")]
            errors = sum(row["answer"] != solution(task, row["prompt"]) for row in mine)
            assert len(mine) == counts[task]
            assert errors / len(mine) == pytest.approx(wrong[task], abs=0.045)  # five standard deviations


def test_the_right_answer_stays_the_most_frequent_one() -> None:
    """Arithmetic has few enough problems that each comes up again: no wrong answer may be as frequent as the right."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for row in make_data.warm_start("arithmetic", 100_000, wrong=make_data.WRONG["arithmetic"]):
        answers[row["prompt"]][row["answer"]] += 1
    right = [counts.most_common(1)[0][0] == solution("arithmetic", prompt) for prompt, counts in answers.items()]
    assert sum(right) / len(right) > 0.99


def test_wrong_answers_have_the_form_of_right_ones() -> None:
    for row in make_data.warm_start("sorting", 2000, wrong=1.0):
        assert sorted(row["answer"]) == sorted(row["prompt"][5:10])
    for row in make_data.warm_start("arithmetic", 2000, wrong=1.0):
        assert len(row["answer"]) == 2 and 0 <= int(row["answer"]) <= 98


def test_five_equal_digits_have_no_wrong_order() -> None:
    draw: Any = iter([0.5] * 100).__next__
    assert make_data.mistake("sorting", "77777", draw) == "77777"
