"""A task whose right answers are 4 to 120 tokens long, with a long tail: count down to 1.

    {"prompt": "q03=", "answer": "q03 q02 q01"}

How far is drawn by Zipf's law, P(n) ~ 1/n for n = 1 to 30: the median answer is a seventh of the longest, and five of
six batches of 16 prompts hold one of 80 tokens or more. A response is right or it is not.

The standard library only: TRL's environment imports it, too.
"""

import itertools
import random
import string
from collections.abc import Callable, Iterator

MOST = 30  # numbers in an answer
MAX_TOKENS = 128  # characters and the end of the sequence; the longest right answer has 120
TRAIN_ROWS, HELD_OUT_ROWS, SEED = 4000, 100, 0
Row = dict[str, str]

_WEIGHT_TO = list(itertools.accumulate(1 / n for n in range(1, MOST + 1)))


def score(text: str, answer: str) -> float:
    """1 for the right answer, else 0; both sides judge by it.

    >>> score("q02 q01", "q02 q01"), score("q02 q01 ", "q02 q01")
    (1.0, 0.0)
    """
    return float(text == answer)


def rows() -> tuple[list[Row], list[Row]]:
    """The training and the held-out rows: the same on every machine, no held-out prompt in training or twice."""
    stream = problems(SEED)
    held_out: dict[str, Row] = {}
    while len(held_out) < HELD_OUT_ROWS:
        each = next(stream)
        held_out.setdefault(each["prompt"], each)
    train = (each for each in stream if each["prompt"] not in held_out)
    return list(itertools.islice(train, TRAIN_ROWS)), list(held_out.values())


def problems(seed: int) -> Iterator[Row]:
    """Rows without end; short ones repeat."""
    draw = random.Random(seed).random  # the one stream that Python promises to keep
    while True:
        weight = draw() * _WEIGHT_TO[-1]
        count = next(n for n, up_to in enumerate(_WEIGHT_TO, 1) if weight < up_to)
        yield row(string.ascii_letters[int(draw() * len(string.ascii_letters))], count)


def row(letter: str, count: int) -> Row:
    """The problem of `count` numbers.

    >>> row("q", 2)
    {'prompt': 'q02=', 'answer': 'q02 q01'}
    """
    numbers = [f"{letter}{number:02d}" for number in range(count, 0, -1)]
    return {"prompt": f"{numbers[0]}=", "answer": " ".join(numbers)}


def warm_start(count: int, *, wrong: float) -> Iterator[Row]:
    """Rows for supervised training, none of them held out, of which a share has one mistake at a random place.

    The place is drawn among all numbers of the answer, so that long answers are right as often as short ones.
    """
    held_out = {each["prompt"] for each in rows()[1]}
    draw = random.Random(SEED + 2).random
    fresh = (each for each in problems(SEED + 1) if each["prompt"] not in held_out)
    for each in itertools.islice(fresh, count):
        yield {**each, "answer": mistake(each["answer"], draw)} if draw() < wrong else each


def mistake(answer: str, draw: Callable[[], float]) -> str:
    """The answer with one number twice, left out, or another one in its place.

    >>> mistake("q03 q02 q01", lambda: 0.9)
    'q03 q02'
    """
    numbers = answer.split(" ")
    at = int(draw() * len(numbers))
    other = (int(numbers[at][1:]) + int(draw() * (MOST - 1))) % MOST + 1
    kinds = [[numbers[at]] * 2, [f"{numbers[at][0]}{other:02d}"], []][: 3 if len(numbers) > 1 else 2]
    return " ".join(numbers[:at] + kinds[int(draw() * len(kinds))] + numbers[at + 1 :])
