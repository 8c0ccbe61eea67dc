"""A task whose right answers are 6 to 120 tokens long, with a long tail: write out the numbers from one to another.

    {"prompt": "97-01=", "answer": "97 98 99 00 01"}

How many numbers there are follows Zipf's law, P(n) ~ 1/n for n = 2 to 40: the median answer is a fifth of the
longest, and nine of ten batches of 16 prompts hold one of 80 tokens or more. A response is right or it is not.

The standard library only: TRL's environment imports it, too.
"""

import itertools
import random
from collections.abc import Callable, Iterator

SIZE, LEAST, MOST = 100, 2, 40  # numbers have two digits, and 00 follows 99; an answer has so many
MAX_TOKENS = 128  # characters and the end of the sequence; the longest right answer has 120
TRAIN_ROWS, HELD_OUT_ROWS, SEED = 4000, 100, 0
Row = dict[str, str]

_WEIGHT_TO = list(itertools.accumulate(1 / n for n in range(LEAST, MOST + 1)))


def score(text: str, answer: str) -> float:
    """1 for the right answer, else 0; both sides judge by it.

    >>> score("17 18", "17 18"), score("17 18 ", "17 18")
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
        count = next(n for n, up_to in enumerate(_WEIGHT_TO, LEAST) if weight < up_to)
        yield row(int(draw() * SIZE), count)


def row(first: int, count: int) -> Row:
    """The problem of `count` numbers from `first` on.

    >>> row(98, 3)
    {'prompt': '98-00=', 'answer': '98 99 00'}
    """
    numbers = [f"{number % SIZE:02d}" for number in range(first, first + count)]
    return {"prompt": f"{numbers[0]}-{numbers[-1]}=", "answer": " ".join(numbers)}


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

    >>> mistake("17 18 19", lambda: 0.9)
    '17 18'
    """
    numbers = answer.split(" ")
    at = int(draw() * len(numbers))
    other = (int(numbers[at]) + 1 + int(draw() * (SIZE - 1))) % SIZE
    kinds = [[numbers[at]] * 2, [f"{other:02d}"], []]
    return " ".join(numbers[:at] + kinds[int(draw() * len(kinds))] + numbers[at + 1 :])
