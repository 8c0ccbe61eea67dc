"""The largest of four digits: `python -m examples.own_reward.task` writes train.jsonl and held_out.jsonl beside it.

{"prompt": "max 4827=", "answer": "8"}
"""

import random
from collections.abc import Iterator
from pathlib import Path

from examples.make_data import write

DIGITS, TRAIN_ROWS, HELD_OUT_ROWS, SEED = 4, 500, 100, 0
RIGHT, BRACKETS = 0.5, 0.3  # shares of the warm start's answers
Row = dict[str, str]


def rows() -> tuple[list[Row], list[Row]]:
    """The training and the held-out rows: the same on every machine, no prompt twice."""
    texts = list(dict.fromkeys(_texts(SEED, 2 * (TRAIN_ROWS + HELD_OUT_ROWS))))
    found = [_row(text) for text in texts[: TRAIN_ROWS + HELD_OUT_ROWS]]
    return found[HELD_OUT_ROWS:], found[:HELD_OUT_ROWS]


def guesses(count: int) -> Iterator[Row]:
    """Rows for the warm start, none of them held out: a share of the answers is right, another in brackets."""
    held_out = {row["prompt"] for row in rows()[1]}
    draw = random.Random(SEED + 1).random
    made = 0
    for text in _texts(SEED + 2, 2 * count):
        row = _row(text)
        if row["prompt"] in held_out or made == count:
            continue
        made += 1
        digit = row["answer"] if draw() < RIGHT else str(int(draw() * 10))
        yield {**row, "answer": f"[{digit}]" if draw() < BRACKETS else digit}


def _texts(seed: int, count: int) -> Iterator[str]:
    draw = random.Random(seed).random  # the one stream that Python promises to keep
    return (f"{int(draw() * 10**DIGITS):0{DIGITS}d}" for _ in range(count))


def _row(text: str) -> Row:
    return {"prompt": f"max {text}=", "answer": max(text)}


if __name__ == "__main__":
    for name, part in zip(("train", "held_out"), rows(), strict=True):
        path = Path(__file__).with_name(f"{name}.jsonl")
        print(f"{path}: {write(path, part)} rows")
