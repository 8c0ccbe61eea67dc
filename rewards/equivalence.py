"""Mathematical equivalence by math-verify; runs in a killable process (rewards/processes.py).

math-verify: https://github.com/huggingface/Math-Verify. Its own time limits are off: they rely on an alarm that one
long integer operation does not let through.
"""

import logging
from collections.abc import Callable
from functools import lru_cache
from itertools import product
from typing import Any

import math_verify  # type: ignore[import-untyped]  # it ships no types
from math_verify import ExprExtractionConfig, LatexExtractionConfig
from sympy import Integer  # type: ignore[import-untyped]

from millrace.core.errors import RewardError, boundary

ONE = Integer(1)
_RESPONSE = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())


def checker() -> Callable[[tuple[str, ...]], Any]:
    """What answers a request.

    ("gold", answer) -> whether the answer can be read, equals itself, and can be compared with another;
    ("check", answer, stated) -> whether they are equal; None where nothing was stated that can be read.
    """
    for name in ("math_verify", "latex2sympy2_extended"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    _gold("1")  # the first use builds grammars and imports more of the library
    return _answered


def _answered(request: tuple[str, ...]) -> Any:
    if request[0] == "gold":
        read = [gold for gold in _gold(request[1]) if not isinstance(gold, str)]
        # Reading is lazy: what can never be evaluated hangs only when it is compared, and must hang here, not when
        # the first response is judged, which would be blamed for it.
        for gold in read:
            _equal(gold, ONE)
        return any(_equal(gold, gold) for gold in read)
    _, answer, stated = request
    read = _read(stated)
    if not read:
        return None
    return any(_equal(gold, value) for gold, value in product(_gold(answer), read))


def _equal(gold: Any, value: Any) -> bool:
    """What the library raises over two kinds that it cannot compare means: not equal."""
    try:
        with boundary("math-verify", RewardError):
            return bool(math_verify.verify(gold, value, timeout_seconds=None, raise_on_error=True))
    except RewardError as caught:
        if isinstance(caught.__cause__, MemoryError | RecursionError):
            raise caught.__cause__ from None
        return False


@lru_cache(maxsize=256)
def _gold(answer: str) -> Any:
    """The row's answer: LaTeX with or without delimiters, or a plain expression."""
    marked = answer if "$" in answer or "\\boxed" in answer else f"\\boxed{{{answer}}}"
    return _read(marked)


def _read(text: str) -> Any:
    return math_verify.parse(text, extraction_config=_RESPONSE, parsing_timeout=None)
