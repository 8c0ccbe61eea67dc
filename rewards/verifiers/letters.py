"""Verifiers of multiple choice."""

import re
from functools import lru_cache

from millrace.core.errors import DataError, RecipeError
from millrace.core.types import Verdict, VerdictKind
from millrace.rewards.stated import boxed, shown

_TEX = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mathsf)\s*\{([^{}]*)\}")


def choice(text: str, answer: str, *, letters: str = "ABCD") -> float | Verdict:
    r"""1 when the letter that the response states last is the answer's; a response that states none has failed.

        r = [stated(text) = stated(answer)]

    Source: the answer extraction for multiple choice of MMLU-Pro (Wang et al. 2024), arXiv:2406.01574: patterns from
    explicit to loose.

    The first of these that occurs, and of it the last occurrence: \boxed{B}; "answer is (B)", "Answer: B",
    "choose B"; a letter in brackets or in bold; one that begins a line, as "B." and "B) 42", or is all of it; a capital
    letter that stands alone and before no word in lower case, which leaves out the article of "A good one".

    Args:
        text: the response, decoded.
        answer: the row's answer: "B", "(B)" or "B. 42".
        letters: what may be stated, as "ABCDE"; lower case is accepted where the statement is explicit.
    Returns:
        0.0 or 1.0, or the verdict of a response that states no letter.
    Raises:
        DataError: the row's answer is none of the letters.
        RecipeError: `letters` are not distinct capital letters.

    >>> choice("Not (A). The answer is (B).", "B"), choice(r"\boxed{\text{c}}", "(C)"), choice("D", "A")
    (1.0, 1.0, 0.0)
    >>> choice("I cannot say", "A").feedback
    "no letter of ABCD in the response 'I cannot say'"
    """
    if not re.fullmatch("[A-Z]{2,}", letters) or len(set(letters)) < len(letters):
        raise RecipeError(f"choice: letters = {letters!r}: give distinct capital letters, as 'ABCD'")
    wanted = _only(answer, letters)
    if wanted is None:
        raise DataError(f"choice: the answer {shown(answer)} is none of {letters}; write the letter alone")
    found = _stated(text, letters)
    if found is None:
        return Verdict(
            kind=VerdictKind.SUBJECT_FAILED, score=0.0, feedback=f"no letter of {letters} in the response {shown(text)}"
        )
    return float(found == wanted)


def _stated(text: str, letters: str) -> str | None:
    box = boxed(text)
    if box is not None and (only := _only(box, letters)):
        return only
    plain = _TEX.sub(r"\1", text)
    for pattern in _patterns(letters):
        last = max(pattern.finditer(plain), key=re.Match.start, default=None)
        if last is not None:
            return next(letter for letter in last.groups() if letter).upper()
    return None


def _only(text: str, letters: str) -> str | None:
    """The letter that a short text is, or begins with as a label."""
    plain = _TEX.sub(r"\1", text).strip().strip("$*").strip()
    match = re.match(rf"[\[(]?(?P<letter>[{letters}{letters.lower()}])(?:[\])]|[.:](?!\w)|$)", plain)
    return match["letter"].upper() if match else None


@lru_cache(maxsize=16)
def _patterns(letters: str) -> tuple[re.Pattern[str], ...]:
    """From explicit to loose; the letter is whichever group took part. Spaces are bounded, so reading stays linear."""
    upper = rf"([{letters}])(?![\w'’])"
    lower = rf"([{letters.lower()}])(?=[)\]]|\.?[ ]{{0,4}}$)"
    verb = r"(?:answer|choice|option|choose|select|pick)"
    is_ = r"(?:\s{1,4}(?:is|are|would be|must be))?\s{0,4}[:=]?"
    marks = r"[\s*_$\"'(\[]{0,6}"
    return (
        re.compile(rf"(?i:\b{verb}\b{is_}){marks}(?:{upper}|{lower})", re.MULTILINE),
        re.compile(rf"[(\[]([{letters}{letters.lower()}])[)\]]|\*\*\s?([{letters}])[.:)]?\s?\*\*"),
        re.compile(
            rf"^[ ]{{0,4}}(?:([{letters}])(?:[.):](?:\s|$)|[ ]{{0,4}}$)|([{letters.lower()}])\)(?:\s|$))", re.MULTILINE
        ),
        re.compile(rf"(?<![\w'’.\\]){upper}(?!\s[a-z])"),
    )
