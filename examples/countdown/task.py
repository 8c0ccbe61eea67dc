"""Countdown in miniature: make a number from two or three others with + - and *.

`python -m examples.countdown.task` writes train.jsonl and held_out.jsonl beside this file:

    {"prompt": "2 4 5 -> 22:", "numbers": [2, 4, 5], "target": 22}

There is no answer in a row: many expressions may do, and the verifier evaluates whatever the model writes. One that
keeps the numbers in their order, such as 2+4*5, always does.
"""

import random
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from examples.make_data import write

LARGEST, MOST = 6, 99  # of the numbers, of a target
TRAIN_ROWS, HELD_OUT_ROWS, SEED = 800, 100, 0
Row = dict[str, Any]
Draw = Callable[[], float]


def rows() -> tuple[list[Row], list[Row]]:
    """The training and the held-out rows: the same on every machine, no prompt twice."""
    draw = random.Random(SEED).random  # the one stream that Python promises to keep
    found = {row["prompt"]: row for row, _ in islice(_problems(draw), 4 * (TRAIN_ROWS + HELD_OUT_ROWS))}
    chosen = list(found.values())[: TRAIN_ROWS + HELD_OUT_ROWS]
    return chosen[HELD_OUT_ROWS:], chosen[:HELD_OUT_ROWS]


def solved(count: int) -> Iterator[Row]:
    """Rows for the warm start, none of them held out: each with a solution."""
    for row, solution in islice(_fresh(SEED + 1), count):
        yield {"prompt": row["prompt"], "answer": solution}


def guessed(count: int) -> Iterator[Row]:
    """The same with signs drawn by chance: about every fifth answer is a solution."""
    draw = random.Random(SEED + 3).random
    for row, _ in islice(_fresh(SEED + 2), count):
        yield {"prompt": row["prompt"], "answer": _expression(row["numbers"], draw)}


def _fresh(seed: int) -> Iterator[tuple[Row, str]]:
    held_out = {row["prompt"] for row in rows()[1]}
    problems = _problems(random.Random(seed).random)
    return ((row, solution) for row, solution in problems if row["prompt"] not in held_out)


def _problems(draw: Draw) -> Iterator[tuple[Row, str]]:
    """Problems, each with the solution it was made of; a third has two numbers, the others have three."""
    while True:
        numbers = [1 + int(draw() * LARGEST) for _ in range(2 if draw() < 1 / 3 else 3)]
        solution = _expression(numbers, draw)
        target = eval(solution)  # digits and signs of our own making
        if 0 < target <= MOST:
            prompt = f"{' '.join(map(str, numbers))} -> {target}:"
            yield {"prompt": prompt, "numbers": numbers, "target": target}, solution


def _expression(numbers: list[int], draw: Draw) -> str:
    first, *others = numbers
    return str(first) + "".join("+-*"[int(draw() * 3)] + str(number) for number in others)


if __name__ == "__main__":
    for name, part in zip(("train", "held_out"), rows(), strict=True):
        path = Path(__file__).with_name(f"{name}.jsonl")
        print(f"{path}: {write(path, part)} rows")
