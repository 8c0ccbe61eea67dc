"""A dataset in chat format: digits to sort, and a second turn that asks for them the other way round.

`python -m examples.chat.task` writes train.jsonl and held_out.jsonl beside this file. A prompt is a list of messages
that ends with the user's; what the assistant shall say is no message, but the column `answer`:

    {"prompt": [{"role": "user", "content": "sort 4453"}], "answer": "3445"}
    {"prompt": [{"role": "user", "content": "sort 4453"}, {"role": "assistant", "content": "3445"},
                {"role": "user", "content": "reverse"}], "answer": "5443"}
"""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from examples.make_data import write

DIGITS, TRAIN_ROWS, HELD_OUT_ROWS, SEED = 4, 400, 100, 0
RIGHT = 0.5  # share of the warm start's answers
Row = dict[str, Any]
Draw = Callable[[], float]


def rows() -> tuple[list[Row], list[Row]]:
    """The training and the held-out rows: the same on every machine, no prompt twice."""
    draw = random.Random(SEED).random  # the one stream that Python promises to keep
    found = {str(row["prompt"]): row for row in (_row(draw) for _ in range(2 * (TRAIN_ROWS + HELD_OUT_ROWS)))}
    chosen = list(found.values())[: TRAIN_ROWS + HELD_OUT_ROWS]
    return chosen[HELD_OUT_ROWS:], chosen[:HELD_OUT_ROWS]


def guesses(count: int) -> Iterator[Row]:
    """Rows for the warm start, none of them held out: of the answers a share is right, the others are in disorder."""
    held_out = [row["prompt"] for row in rows()[1]]
    draw = random.Random(SEED + 1).random
    made = 0
    while made < count:
        row = _row(draw)
        if row["prompt"] not in held_out:
            made += 1
            yield row if draw() < RIGHT else {**row, "answer": "".join(sorted(row["answer"], key=lambda _: draw()))}


def _row(draw: Draw) -> Row:
    digits = f"{int(draw() * 10**DIGITS):0{DIGITS}d}"
    ascending = "".join(sorted(digits))
    asked = [{"role": "user", "content": f"sort {digits}"}]
    if draw() < 0.5:
        return {"prompt": asked, "answer": ascending}
    turns = [{"role": "assistant", "content": ascending}, {"role": "user", "content": "reverse"}]
    return {"prompt": [*asked, *turns], "answer": ascending[::-1]}


if __name__ == "__main__":
    for name, part in zip(("train", "held_out"), rows(), strict=True):
        path = Path(__file__).with_name(f"{name}.jsonl")
        print(f"{path}: {write(path, part)} rows")
