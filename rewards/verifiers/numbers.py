"""Verifiers that compare numbers."""

import math
import re
from decimal import Context, Decimal

from millrace.core.errors import DataError, RecipeError
from millrace.core.types import Verdict, VerdictKind
from millrace.rewards.stated import shown, stated

# 50 digits, so that long integers compare exactly; no traps, so that no text can raise: what overflows is not finite.
_ARITHMETIC = Context(prec=50, traps=[])

# No part can match, fail later and be tried again from its middle, so reading stays linear in a hostile text.
_UNSIGNED = r"(?:[0-9]{1,3}(?:,[0-9]{3}(?![0-9]))++|[0-9]++)(?:\.[0-9]*+)?|(?<!\.)\.[0-9]++"
_EXPONENT = r"(?:[eE][-+]?[0-9]+)?"
# A sign counts only where nothing stands before it that could be subtracted from: "5-3" ends in 3, "= -3" in -3.
# Digits within a word ("x2") and after a second point ("1.2.3") are no numbers.
_NUMBER = re.compile(
    r"(?:(?<![\w.)\]}])[-+])?(?:[$€£]\s?)?(?<!\w)(?<![0-9]\.)"
    rf"(?P<over>(?:{_UNSIGNED}){_EXPONENT})"
    rf"(?:\s?/\s?(?P<under>(?:{_UNSIGNED}){_EXPONENT}))?"
    r"(?P<percent>\s?%)?"
)
_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_SIGNS = str.maketrans({"−": "-", "–": "-", "\u00a0": " ", "\u202f": " "})


def numeric(
    text: str, answer: str | float, *, tolerance: float = 0.0, relative: float = 1e-9, last_number: bool = True
) -> float | Verdict:
    """1 when the response's number is the answer's, within a tolerance; a response without a number has failed.

        r = [|x - a| <= max(tolerance, relative * |a|)]

    Source: the outcome reward of RLVR, Tulu 3 (Lambert et al. 2024), arXiv:2411.15124; the closeness of PEP 485, with
    the answer as the reference.

    Read are signs, decimals, thousands separators (1,234.5), scientific notation (6.02e23), fractions (3/4,
    \\frac{3}{4}), per cent (50% is 0.5) and amounts ($5). Where the text holds a \\boxed{} or a ####, only what stands
    in the last \\boxed{}, else behind the last ####, is read. Mixed numbers (1 1/2) are read as two. A response with no
    number, or with one that is not finite, is a SUBJECT_FAILED verdict: it trains as `rewards.lowest`.

    Args:
        text: the response, decoded.
        answer: the row's answer, one number.
        tolerance: absolute, in units of the answer.
        relative: as a share of the answer.
        last_number: take the last number in the response; otherwise it must hold a number and nothing else.
    Returns:
        0.0 or 1.0, or the verdict of a response that cannot be read.
    Raises:
        DataError: the row's answer is not a finite number; that is never the response's fault.
        RecipeError: a tolerance is negative or not finite.

    >>> numeric("6 * 7 makes 42.", "42"), numeric("41", "42"), numeric("0.5", "1/2"), numeric("1,000", 1e3)
    (1.0, 0.0, 1.0, 1.0)
    >>> numeric("no idea", "42").feedback
    "no number in the response 'no idea'"
    """
    if not (0 <= tolerance < math.inf and 0 <= relative < math.inf):
        raise RecipeError(f"numeric: tolerance={tolerance}, relative={relative}: give finite numbers of at least 0")
    target = _read(str(answer), last_number=False)
    if target is None:
        raise DataError(
            f"numeric: the answer {shown(str(answer))} is not one finite number; "
            "write it as a number, or compare text with the verifier 'exact'"
        )
    value = _read(text, last_number=last_number)
    if value is None:
        wanted = "no number in" if last_number else "more than a number, or none, in"
        return Verdict(kind=VerdictKind.SUBJECT_FAILED, score=0.0, feedback=f"{wanted} the response {shown(text)}")
    room = max(Decimal(tolerance), _ARITHMETIC.multiply(Decimal(relative), target.copy_abs()))
    return float(_ARITHMETIC.subtract(value, target).copy_abs() <= room)


def _read(text: str, *, last_number: bool) -> Decimal | None:
    """The number that `text` states; None when it states none that is finite."""
    text = stated(text).translate(_SIGNS)
    text = _FRACTION.sub(r"\1/\2", text).replace("{,}", ",").replace("\\%", "%").replace("\\$", "$")
    if not last_number:
        match = _NUMBER.fullmatch(text.strip().rstrip(".").strip("$"))
    else:
        match = max(_NUMBER.finditer(text), key=re.Match.start, default=None)
    return _value(match) if match else None


def _value(match: re.Match[str]) -> Decimal | None:
    value = _decimal(match["over"])
    if match["under"]:
        value = _ARITHMETIC.divide(value, _decimal(match["under"]))
    if match["percent"]:
        value = _ARITHMETIC.divide(value, Decimal(100))
    if match[0].startswith("-"):
        value = value.copy_negate()
    return value if value.is_finite() else None


def _decimal(digits: str) -> Decimal:
    return _ARITHMETIC.create_decimal(digits.replace(",", ""))
