"""What the regex, choice and countdown verifiers make of an answer."""

import random
import string
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.core.errors import DataError, RecipeError
from millrace.core.types import Verdict, VerdictKind
from millrace.rewards.verifiers import choice, countdown, regex


def failed(verdict: Any) -> bool:
    return isinstance(verdict, Verdict) and verdict.kind is VerdictKind.SUBJECT_FAILED


@pytest.mark.parametrize(
    ("text", "settings", "score"),
    [
        ("see 42 here", {"pattern": r"\d+"}, 1.0),
        ("see here", {"pattern": r"\d+"}, 0.0),
        ("see 42 here", {"pattern": r"\d+", "where": "full"}, 0.0),
        (" 42\n", {"pattern": r"\d+", "where": "full"}, 1.0),
        ("a\nb", {"pattern": "a.b", "where": "full"}, 1.0),
        ("x\nAnswer", {"pattern": "^answer$", "ignore_case": True}, 1.0),
        ("1 then 2", {"pattern": r"(\d)", "group": 1}, 1.0),
        ("1 then 2", {"pattern": r"(\d)", "group": 1, "where": "first"}, 0.0),
        ("it is 2 ", {"pattern": r"is(?P<n>.*)", "group": "n"}, 1.0),
        ("2", {"pattern": r"\d", "group": 0, "where": "full"}, 1.0),
    ],
)
def test_regex(text: str, settings: dict[str, Any], score: float) -> None:
    assert regex(text, "2", **settings) == score


def test_regex_compares_letters_as_asked() -> None:
    assert regex("= YES", "yes", pattern="= (.*)", group=1) == 0.0
    assert regex("= YES", "yes", pattern="= (.*)", group=1, ignore_case=True) == 1.0


def test_regex_without_a_match_states_no_answer() -> None:
    assert failed(regex("none", "2", pattern=r"(\d)", group=1))
    assert failed(regex("x", "2", pattern=r"(\d)|x", group=1))  # it matches, and captures nothing


def test_regex_says_what_is_wrong_with_the_recipe_or_the_row() -> None:
    with pytest.raises(RecipeError, match="no regular expression"):
        regex("x", pattern="(")
    with pytest.raises(RecipeError, match="has no group 2; it has 0, 1, n"):
        regex("x", "x", pattern="(?P<n>x)", group=2)
    with pytest.raises(DataError, match="no answer to compare group 1"):
        regex("x", pattern="(x)", group=1)


@pytest.mark.parametrize(
    "text",
    [
        "B", "(B)", "b)", "Answer: B", "answer: b", r"\boxed{B}", r"\boxed{\text{(B)}}", r"$\boxed{\mathrm{B}}$",
        r"\boxed{B. 42}", "The answer is b.", "The answer is (B), not (C).", "A good one is B", "**B**",
        "**Answer:** B", "A. no\nB. yes\nAnswer: **B**", "Final Answer: (b)", "Therefore, option B.", "B) 42",
        "B. 42", r"\textbf{B}", "The correct choice is:\n\nB", "Answer is $B$", "answer (C)? no, answer (B)",
        r"(A), (C); \boxed{B}",
        "I choose B", "First (A), then (B)", "Answer: A. Hmm. Answer: B",
    ],
)  # fmt: skip
def test_choice_reads(text: str) -> None:
    assert choice(text, "B") == 1.0
    assert choice(text, "C") == 0.0


@pytest.mark.parametrize(
    "text", ["", "none of them", "A good question", "the answer is a number", "Dogs And Cats", "E"]
)
def test_choice_finds_no_letter(text: str) -> None:
    assert failed(choice(text, "B"))


def test_choice_takes_other_letters_and_answers_with_text() -> None:
    assert choice("(J)", "J", letters="ABCDEFGHIJ") == 1.0
    assert choice("(B)", "B. 42") == choice("(B)", " (b) ") == 1.0
    for answer in ("E", "42", "Because"):
        with pytest.raises(DataError, match="is none of ABCD"):
            choice("(B)", answer)
    for letters in ("abc", "AAB", "A", "A]"):
        with pytest.raises(RecipeError, match="distinct capital letters"):
            choice("(B)", "B", letters=letters)


NUMBERS, TARGET = [4, 5, 25], 80


@pytest.mark.parametrize(
    ("text", "score", "numbers"),
    [
        ("(25-5)*4", 1.0, 1.0),
        ("So: (25 - 5) × 4 = 80", 1.0, 1.0),
        (r"\boxed{(25-5)\times 4 = 80}", 1.0, 1.0),
        (r"\boxed{\left(25-5\right)\cdot 4}", 1.0, 1.0),
        ("<answer>1+1</answer> no: <answer> 4*(25-5) </answer>", 1.0, 1.0),
        ("1. first\n2. (25-5)*4\nDone", 1.0, 1.0),
        ("4/(1/(25-5))", 0.0, 0.0),  # 1 is not given
        ("25-5*4", 0.1, 1.0),
        ("<answer>80</answer>", 0.0, 0.0),
        ("<answer>25*4-5*4</answer>", 0.0, 0.0),  # 4 is given once
        ("<answer>25*4-20</answer>", 0.0, 0.0),
        ("<answer>-(5-25)*4</answer>", 1.0, 1.0),
        ("<answer>25-(-5)+4</answer>", 0.1, 1.0),
    ],
)
def test_countdown(text: str, score: float, numbers: float) -> None:
    assert countdown(text, NUMBERS, TARGET, partial=0.1) == {"score": score, "numbers": numbers}


def test_countdown_may_leave_numbers_out() -> None:
    assert countdown("4*5", NUMBERS, 20) == {"score": 0.0, "numbers": 0.0}
    assert countdown("4*5", NUMBERS, 20, every_number=False) == {"score": 1.0, "numbers": 1.0}
    assert countdown("5*5", NUMBERS, 25, every_number=False) == {"score": 0.0, "numbers": 0.0}


def test_countdown_is_exact() -> None:
    assert countdown("<answer>8/(3-8/3)</answer>", [3, 3, 8, 8], 24)["score"] == 1.0  # type: ignore[index]  # 23.999.. in floats


@pytest.mark.parametrize(
    "text",
    [
        "", "no idea", "80", "<answer>__import__('os').getpid()</answer>", "<answer>2**9999999</answer>",
        "<answer>25/(5-5)+4</answer>", "<answer>1e5</answer>", "<answer>25 5</answer>", "<answer>True+4</answer>",
        "<answer>25//5</answer>", "<answer>4 if 5 else 25</answer>", "<answer>x</answer>", "<answer>05+4</answer>",
        "<answer>" + "(" * 99 + "4" + ")" * 99 + "</answer>", "(" * 30_000, "1+" * 30_000 + "1",
    ],
)  # fmt: skip
def test_countdown_evaluates_nothing_else(text: str) -> None:
    assert failed(countdown(text, NUMBERS, TARGET))


@pytest.mark.parametrize(
    ("numbers", "target"),
    [("4 5", 80), ([], 80), ([4, "5"], 80), ([4.5], 80), ([True], 80), ([4], "80"), ([4], 0.5), (7, 7)],
)
def test_countdown_names_what_is_wrong_with_the_row(numbers: Any, target: Any) -> None:
    with pytest.raises(DataError, match="countdown: the column (numbers|target)"):
        countdown("4+5", numbers, target)


@given(st.integers(0, 2**32), st.lists(st.integers(1, 99), min_size=2, max_size=6))
def test_countdown_agrees_with_how_an_expression_was_built(seed: int, numbers: list[int]) -> None:
    dice = random.Random(seed)
    terms = [(str(number), Fraction(number)) for number in numbers]
    while len(terms) > 1:
        (left, a), (right, b) = (terms.pop(dice.randrange(len(terms))) for _ in range(2))
        sign = dice.choice("+-*/" if b else "+-*")
        value = {"+": a + b, "-": a - b, "*": a * b}.get(sign) if sign != "/" else a / b
        assert value is not None
        terms.append((f"({left}{sign}{right})", value))
    ((text, value),) = terms
    if value.denominator == 1:
        assert countdown(text, numbers, int(value)) == {"score": 1.0, "numbers": 1.0}
    assert countdown(text, numbers, int(value) + 1 if value.denominator == 1 else int(value))["score"] == 0.0  # type: ignore[index]


@given(st.text(alphabet=string.printable + "×\\boxed{}<answer>", max_size=200))
def test_no_text_breaks_a_verifier(text: str) -> None:
    assert failed(found := countdown(text, NUMBERS, TARGET)) or found["score"] in (0.0, 1.0)  # type: ignore[index]
    assert failed(letter := choice(text, "B")) or letter in (0.0, 1.0)


@pytest.mark.parametrize(
    "piece", ["(", "1", "1 ", "- ", "answer ", "answer: ", "\\boxed{", "<answer>", "A.", "**", "\n "]
)
def test_reading_a_hostile_text_ends(piece: str) -> None:
    text = piece * (100_000 // len(piece))
    countdown(text, NUMBERS, TARGET)
    choice(text, "B")
