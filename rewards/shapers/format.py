"""Shapers that weigh how a response is written."""

import re
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from pydantic import NonNegativeFloat, PositiveInt

from millrace.core.errors import RecipeError
from millrace.core.types import Floats


def matches(
    reward_G: Floats,
    text_G: Sequence[str],
    *,
    pattern: str,
    bonus: NonNegativeFloat = 0.0,
    penalty: NonNegativeFloat = 0.5,
    full: bool = False,
) -> Floats:
    r"""A bonus for every response in which a pattern is found, a penalty for every other.

        r'_i = r_i + bonus if the pattern matches text_i, else r_i - penalty

    Source: the format reward of DeepSeek-R1 (DeepSeek-AI 2025), arXiv:2501.12948, section 2.2.2.

    Args:
        reward_G: any unit.
        text_G: the responses.
        pattern: a regular expression; . matches a line's end too. Avoid nested repetition: on a hostile text it hangs.
        bonus: in units of the reward.
        penalty: in units of the reward.
        full: the whole response must match, white space around it left out; otherwise some part of it.
    Returns:
        reward_G, raised or lowered.
    Raises:
        RecipeError: the pattern is no regular expression.

    >>> texts = ["<think>2 + 2</think>4", "4"]
    >>> matches(np.ones(2, np.float32), texts, pattern="<think>.*</think>.+", bonus=0.25, full=True)
    array([1.25, 0.5 ], dtype=float32)
    """
    compiled = _compiled(pattern)
    found_G = [bool(compiled.fullmatch(text.strip()) if full else compiled.search(text)) for text in text_G]
    return np.asarray(reward_G + np.where(found_G, bonus, -penalty), np.float32)


def repetition(
    reward_G: Floats, text_G: Sequence[str], *, size: PositiveInt = 3, penalty: NonNegativeFloat = 1.0
) -> Floats:
    """A penalty in proportion to how much of a response repeats runs of words that it already holds.

        r'_i = r_i - penalty * (1 - distinct runs / runs)      over the runs of `size` words; 0 with fewer words

    Source: the n-gram repetition penalty of Demystifying Long Chain-of-Thought Reasoning in LLMs (Yeo et al. 2025),
    arXiv:2502.03373, as one number per response instead of one per token.

    Args:
        reward_G: any unit.
        text_G: the responses; words are separated by white space, upper and lower case are the same.
        size: words of a run.
        penalty: of a response that is nothing but repetition, in units of the reward.
    Returns:
        reward_G, lowered by less than `penalty`.

    >>> repetition(np.ones(3, np.float32), ["a b c d", "Wait wait wait wait wait", "so"], size=2)
    array([1.  , 0.25, 1.  ], dtype=float32)
    """
    return np.asarray(reward_G - penalty * np.array([_repeated(text, size) for text in text_G]), np.float32)


def _repeated(text: str, size: int) -> float:
    words = text.lower().split()
    runs = [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]
    return 1.0 - len(set(runs)) / len(runs) if runs else 0.0


@lru_cache(maxsize=64)
def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as caught:
        raise RecipeError(f"matches: pattern = {pattern!r} is no regular expression: {caught}") from None
