"""Verifiers that look for a pattern."""

import re
from functools import lru_cache
from typing import Literal

from millrace.core.errors import DataError, RecipeError
from millrace.core.types import Verdict, VerdictKind
from millrace.rewards.stated import shown


def regex(
    text: str,
    answer: str | None = None,
    *,
    pattern: str,
    where: Literal["first", "last", "full"] = "last",
    group: int | str | None = None,
    ignore_case: bool = False,
) -> float | Verdict:
    r"""1 when a pattern is found; with `group`, when what it captured is the answer.

        r = [pattern matches text]              without group
        r = [captured = answer]                 with group; white space around either counts for nothing

    Source: the rule-based accuracy and format rewards of DeepSeek-R1 (DeepSeek-AI 2025), arXiv:2501.12948.

    A pattern with nested repetition, as (a+)+, can take for ever on a hostile response and holds the whole reward
    worker meanwhile: run such a one as `{ name = "isolated", verifier = { name = "regex", ... } }`.

    Args:
        text: the response, decoded.
        answer: the row's answer; needed with `group` only.
        pattern: a regular expression; . matches a line's end too, ^ and $ match at every line.
        where: which match counts: the first, the last, or the whole response, white space around it left out.
        group: number or name of the group whose text is compared with the answer.
        ignore_case: letters are compared case-folded, in the pattern and with the answer.
    Returns:
        0.0 or 1.0; with `group`, a response without a match is a SUBJECT_FAILED verdict: it states no answer.
    Raises:
        DataError: `group` is given, and the row has no answer.
        RecipeError: the pattern is no regular expression, or has no such group.

    >>> regex("<think>6 * 7</think>42", pattern="<think>.*</think>.+", where="full")
    1.0
    >>> regex("Answer: 41. No. Answer: 42", "42", pattern=r"Answer: (\d+)", group=1)
    1.0
    """
    compiled = _compiled(pattern, ignore_case, group)
    if where == "full":
        match = compiled.fullmatch(text.strip())
    elif where == "first" or group is None:
        match = compiled.search(text)
    else:
        match = max(compiled.finditer(text), key=re.Match.start, default=None)
    if group is None:
        return float(match is not None)
    if answer is None:
        raise DataError(f"regex: the row has no answer to compare group {group!r} with; add one, or leave it out")
    if match is None or match[group] is None:
        return Verdict(
            kind=VerdictKind.SUBJECT_FAILED,
            score=0.0,
            feedback=f"no match of {pattern!r} in {shown(text)}",
        )
    captured, wanted = match[group].strip(), answer.strip()
    return float(captured.casefold() == wanted.casefold() if ignore_case else captured == wanted)


@lru_cache(maxsize=64)
def _compiled(pattern: str, ignore_case: bool, group: int | str | None) -> re.Pattern[str]:
    try:
        compiled = re.compile(pattern, re.DOTALL | re.MULTILINE | (re.IGNORECASE if ignore_case else re.NOFLAG))
    except re.error as caught:
        raise RecipeError(f"regex: pattern = {pattern!r} is no regular expression: {caught}") from None
    known = (*range(compiled.groups + 1), *compiled.groupindex)
    if group is not None and group not in known:
        raise RecipeError(f"regex: pattern = {pattern!r} has no group {group!r}; it has {', '.join(map(str, known))}")
    return compiled
