"""Tasks that are generated: rows of small problems with one right answer each."""

import random
from collections.abc import Iterator

from millrace.core.errors import ConfigError

Problem = dict[str, str]  # prompt and answer


def sorting(*, seed: int, digits: int = 5) -> Iterator[Problem]:
    """Digits to put into ascending order.

        answer = sorted(prompt's digits)

    Source: sorting as a test of sequence models, Order Matters (Vinyals et al. 2015), arXiv:1511.06391.

    Args:
        seed: the same seed gives the same rows on every machine.
        digits: how many, 1 to 9; drawn uniformly, with repetition.
    Yields:
        Rows with `prompt` and `answer`, until every prompt has been given once.

    >>> next(sorting(seed=0))
    {'prompt': 'sort 84442=', 'answer': '24448'}
    """
    if not 1 <= digits <= 9:
        raise ConfigError(f"sorting: digits={digits}; choose 1 to 9")
    for number in _distinct(10**digits, seed):
        text = f"{number:0{digits}d}"
        yield {"prompt": f"sort {text}=", "answer": "".join(sorted(text))}


def arithmetic(*, seed: int, largest: int = 49, signs: str = "+-") -> Iterator[Problem]:
    """Sums, differences, or both, of two numbers of two digits each, 05 for 5; the difference is never negative.

        a + b or a - b, 0 <= a, b <= largest

    Source: addition as a test of sequence models, Learning to Execute (Zaremba & Sutskever 2014), arXiv:1410.4615.

    Args:
        seed: the same seed gives the same rows on every machine.
        largest: of both numbers, 1 to 49, so that every answer has two digits.
        signs: "+", "-" or "+-".
    Yields:
        Rows with `prompt` and `answer`, until every prompt has been given once.

    >>> next(arithmetic(seed=0))
    {'prompt': '34-22=', 'answer': '12'}
    """
    if not 1 <= largest <= 49:
        raise ConfigError(f"arithmetic: largest={largest}; choose 1 to 49")
    if signs not in ("+", "-", "+-"):
        raise ConfigError(f"arithmetic: signs={signs!r}; choose '+', '-' or '+-'")
    size = largest + 1
    for number in _distinct(len(signs) * size * size, seed):
        which, pair = divmod(number, size * size)
        a, b = divmod(pair, size)
        if signs[which] == "+":
            yield {"prompt": f"{a:02d}+{b:02d}=", "answer": f"{a + b:02d}"}
        elif a >= b:
            yield {"prompt": f"{a:02d}-{b:02d}=", "answer": f"{a - b:02d}"}


def _distinct(count: int, seed: int) -> Iterator[int]:
    """0 to count - 1 in random order; `random.Random.random` is the stream that Python promises to keep."""
    draw, seen = random.Random(seed).random, set[int]()
    while len(seen) < count:
        number = int(draw() * count)
        if number not in seen:
            seen.add(number)
            yield number
