"""Writes the example tasks: `python examples/make_data.py [FOLDER]`; the files beside this script are its output.

    sorting/train.jsonl, sorting/held_out.jsonl            five digits into ascending order
    arithmetic/train.jsonl, arithmetic/held_out.jsonl      sums of two numbers up to 49

No held-out prompt is in a training file. `--warm-start` writes two files more, for supervised training of a random
model before reinforcement learning, both tasks in each:

    right.jsonl      right answers, to learn the tasks from
    noisy.jsonl      answers of which 40 % (sorting) and 65 % (arithmetic) are wrong ON PURPOSE

Trained on the first and then briefly on the second, a model knows the tasks, but, sampled at temperature 1, is right
less than half of the time: reinforcement learning has something to do. What is wrong is drawn anew for each row: the
same digits in another order (sorting), another number from 00 to 98 (arithmetic).
"""

import argparse
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from millrace.actors.datasets import arithmetic, sorting

TRAIN_ROWS, HELD_OUT_ROWS, SEED = 2000, 200, 0
Row = dict[str, str]

RIGHT = {"sorting": 20_000, "arithmetic": 44_000}  # rows; arithmetic is the harder one to learn
NOISY = {"sorting": 3_200, "arithmetic": 3_200}
WRONG = {"sorting": 0.4, "arithmetic": 0.65}  # share of the noisy rows' answers

TASKS: dict[str, Callable[..., Iterator[Row]]] = {"sorting": sorting, "arithmetic": partial(arithmetic, signs="+")}


def rows(task: str) -> tuple[list[Row], list[Row]]:
    """The training and the held-out rows of a task: the same on every machine, no prompt twice."""
    problems = TASKS[task](seed=SEED)
    held_out = list(islice(problems, HELD_OUT_ROWS))
    return list(islice(problems, TRAIN_ROWS)), held_out


def warm_start(task: str, count: int, *, wrong: float) -> Iterator[Row]:
    """Rows for supervised training, none of them held out, with a stated share of wrong answers.

    Args:
        task: "sorting" or "arithmetic".
        count: how many; a task with fewer problems repeats them, each time with new mistakes.
        wrong: the share of wrong answers, drawn row by row: the same digits in another order (sorting), or another
            number from 00 to 98 (arithmetic). Wrong answers are spread over many, so that the right one remains
            the most frequent and reinforcement learning can find it.
    """
    draw = random.Random(f"{SEED} {task} {wrong}").random  # the one stream that Python promises to keep
    problems = list(islice(TASKS[task](seed=SEED), HELD_OUT_ROWS, HELD_OUT_ROWS + count))
    for number in range(count):
        if number % len(problems) == 0:
            problems.sort(key=lambda _: draw())
        row = problems[number % len(problems)]
        yield {**row, "answer": mistake(task, row["answer"], draw)} if draw() < wrong else row


def mistake(task: str, answer: str, draw: Callable[[], float]) -> str:
    """A wrong answer of the right form; the right one only where there is no other."""
    wrong = answer
    while wrong == answer and len(set(answer)) > (task == "sorting"):
        wrong = "".join(sorted(answer, key=lambda _: draw())) if task == "sorting" else f"{int(draw() * 99):02d}"
    return wrong


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """One JSON object per line; returns how many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return len(lines)


def write_warm_start(folder: Path) -> tuple[Path, Path]:
    """Writes right.jsonl and noisy.jsonl, both tasks in each, and returns their paths."""
    right, noisy = folder / "right.jsonl", folder / "noisy.jsonl"
    write(right, chain.from_iterable(warm_start(task, RIGHT[task], wrong=0.0) for task in TASKS))
    write(noisy, chain.from_iterable(warm_start(task, NOISY[task], wrong=WRONG[task]) for task in TASKS))
    return right, noisy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parent)
    parser.add_argument("--warm-start", type=Path, metavar="FOLDER", help="write the warm-start files there instead")
    arguments = parser.parse_args()
    if arguments.warm_start:
        for path in write_warm_start(arguments.warm_start):
            print(path)
    else:
        for task in TASKS:
            for name, part in zip(("train", "held_out"), rows(task), strict=True):
                path = arguments.folder / task / f"{name}.jsonl"
                print(f"{path}: {write(path, part)} rows")
