"""Verifiers of puzzles."""

import ast
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Annotated, Any

from pydantic import Field

from millrace.core.errors import DataError
from millrace.core.types import Verdict, VerdictKind
from millrace.rewards.stated import boxed, shown

Share = Annotated[float, Field(ge=0, le=1)]

LONGEST = 40  # characters of an expression for each number it is given
_SIGNS = str.maketrans({"×": "*", "·": "*", "⋅": "*", "÷": "/", "−": "-", "–": "-", "[": "(", "]": ")"})
_TEX = ((r"\times", "*"), (r"\cdot", "*"), (r"\div", "/"), (r"\left", ""), (r"\right", ""), ("$", ""))
# Begins only where no sign stands before it, so that a long run of brackets is not read again from each of them.
_EXPRESSION = re.compile(r"(?<![-+(])[-+(]*+[0-9](?:[0-9+\-*/()\s]*[0-9)])?")


def countdown(
    text: str, numbers: Sequence[int], target: int, *, every_number: bool = True, partial: Share = 0.0
) -> Mapping[str, float] | Verdict:
    r"""1 when the expression that the response states makes the target from the given numbers.

        r = 1 if value = target, else partial if only the numbers are right, else 0

    Source: Stream of Search (Gandhi et al. 2024), arXiv:2404.03683, its Countdown; partial credit as the format reward
    of DeepSeek-R1 (DeepSeek-AI 2025), arXiv:2501.12948.

    Read is the last \boxed{}, else the last <answer>...</answer>, else the last run of digits, operators and brackets
    with an operator in it; of an equation, its left side. It may hold whole numbers, + - * / and brackets, and is
    evaluated with exact fractions.

    Args:
        text: the response, decoded.
        numbers: the row's column: whole numbers, each to be used as often as it is listed.
        target: the row's column: a whole number.
        every_number: all of them must be used; otherwise at most all of them.
        partial: the score of an expression of the right numbers with another value.
    Returns:
        `score`, and the component `numbers`: 1 when the right numbers were used; or the verdict of a response without
        an expression that can be evaluated.
    Raises:
        DataError: the row's numbers or target are not whole numbers.

    >>> countdown("<answer>(25 - 5) * 4</answer>", [4, 5, 25], 80)
    {'score': 1.0, 'numbers': 1.0}
    >>> countdown("25 + 5 + 4 = 34", [4, 5, 25], 80, partial=0.1)
    {'score': 0.1, 'numbers': 1.0}
    >>> countdown("79 + 1", [4, 5, 25], 80)
    {'score': 0.0, 'numbers': 0.0}
    """
    given, wanted = [_whole(number, "numbers") for number in _listed(numbers)], _whole(target, "target")
    expression = _stated(text)
    if len(expression) > LONGEST * max(len(given), 1):
        return _failed(f"an expression of {len(expression)} characters over {len(given)} numbers")
    try:
        used: list[int] = []
        value = _value(ast.parse(expression.strip(), mode="eval").body, used)
    except (SyntaxError, ValueError, MemoryError, RecursionError):  # the last two: brackets nested too deeply
        return _failed(f"no expression of whole numbers and + - * / in the response {shown(text)}")
    except ZeroDivisionError:
        return _failed(f"the expression {expression.strip()!r} divides by 0")
    over = Counter(used) - Counter(given)
    right = not over and (not every_number or len(used) == len(given))
    score = 1.0 if right and value == wanted else partial if right else 0.0
    return {"score": score, "numbers": float(right)}


def _value(node: ast.expr, used: list[int]) -> Fraction:
    """Evaluate; whole numbers that occur are added to `used`. ValueError for anything else."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _value(node.operand, used)
        return -value if isinstance(node.op, ast.USub) else value
    if not isinstance(node, ast.BinOp):
        raise ValueError(ast.dump(node))
    left, right = _value(node.left, used), _value(node.right, used)
    match node.op:
        case ast.Add():
            return left + right
        case ast.Sub():
            return left - right
        case ast.Mult():
            return left * right
        case ast.Div():
            return left / right
    raise ValueError(ast.dump(node))


def _stated(text: str) -> str:
    """The expression's text."""
    stated = boxed(text)
    if stated is None and (end := text.rfind("</answer>")) >= 0 and (start := text.rfind("<answer>", 0, end)) >= 0:
        stated = text[start + len("<answer>") : end]
    marked = stated is not None
    plain = (text if stated is None else stated).translate(_SIGNS)
    for tex, sign in _TEX:
        plain = plain.replace(tex, sign)
    if marked:
        return plain.partition("=")[0]
    runs = [run for run in _EXPRESSION.findall(plain) if re.search(r"[0-9)]\s*[-+*/]", run)]
    return str(runs[-1]).replace("\n", " ") if runs else ""


def _listed(numbers: Any) -> Sequence[Any]:
    if isinstance(numbers, str) or not isinstance(numbers, Sequence) or not numbers:
        raise DataError(f"countdown: the column numbers is {numbers!r}; write a list of whole numbers, as [3, 7, 25]")
    return numbers


def _whole(value: Any, column: str) -> int:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole and not (isinstance(value, float) and value.is_integer()):
        raise DataError(f"countdown: the column {column} holds {value!r}; write whole numbers")
    return int(value)


def _failed(cause: str) -> Verdict:
    return Verdict(kind=VerdictKind.SUBJECT_FAILED, score=0.0, feedback=cause)
