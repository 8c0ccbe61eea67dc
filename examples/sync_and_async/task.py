"""Counting down, with answers of very uneven length.

`python -m examples.sync_and_async.task` writes train.jsonl and held_out.jsonl beside this file:

    {"prompt": "57>53:", "answer": "57 56 55 54 53"}

How many numbers there are is long-tailed: half of the answers have seven or fewer, one in fifteen has forty.
"""

import random
from collections.abc import Callable, Iterator
from itertools import islice, takewhile
from operator import eq
from pathlib import Path

from examples.make_data import write

SHORTEST, LONGEST = 3, 40  # numbers of an answer
TRAIN_ROWS, HELD_OUT_ROWS, SEED = 400, 64, 0
SKIPPED = 0.05  # of the numbers in the warm start's answers
Row = dict[str, str]
Draw = Callable[[], float]


def share(text: str, answer: str) -> float:
    """The reward: how much of the answer stands before the first mistake.

    >>> share("57 56 55", "57 56 55"), share("57 55 54", "57 56 55")
    (1.0, 0.5)
    """
    right = sum(1 for _ in takewhile(bool, map(eq, text, answer)))
    return right / max(len(text), len(answer))


def rows() -> tuple[list[Row], list[Row]]:
    """The training and the held-out rows: the same on every machine, no prompt twice."""
    draw = random.Random(SEED).random  # the one stream that Python promises to keep
    found = {row["prompt"]: row for row in islice(_rows(draw, skipped=0.0), 3 * (TRAIN_ROWS + HELD_OUT_ROWS))}
    chosen = list(found.values())[: TRAIN_ROWS + HELD_OUT_ROWS]
    return chosen[HELD_OUT_ROWS:], chosen[:HELD_OUT_ROWS]


def guesses(count: int) -> Iterator[Row]:
    """Rows for the warm start, none of them held out: now and then a number is skipped."""
    held_out = {row["prompt"] for row in rows()[1]}
    fresh = (row for row in _rows(random.Random(SEED + 1).random, skipped=SKIPPED) if row["prompt"] not in held_out)
    return islice(fresh, count)


def _rows(draw: Draw, *, skipped: float) -> Iterator[Row]:
    while True:
        many = min(LONGEST, int(SHORTEST / (1 - draw())))  # Pareto's distribution
        last = int(draw() * (100 - many))
        numbers = range(last + many - 1, last - 1, -1)
        answer = [f"{n:02d}" for n in numbers if draw() >= skipped or n in (numbers[0], last)]
        yield {"prompt": f"{numbers[0]:02d}>{last:02d}:", "answer": " ".join(answer)}


if __name__ == "__main__":
    for name, part in zip(("train", "held_out"), rows(), strict=True):
        path = Path(__file__).with_name(f"{name}.jsonl")
        print(f"{path}: {write(path, part)} rows")
