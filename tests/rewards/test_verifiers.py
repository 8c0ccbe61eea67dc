"""What each verifier makes of an answer."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from millrace.core.errors import DataError, RecipeError
from millrace.core.types import Verdict, VerdictKind
from millrace.rewards import verifiers
from millrace.rewards.verifiers import exact, numeric, position_match

FINITE = st.floats(allow_nan=False, allow_infinity=False)


def test_the_catalogue_lists_what_it_holds() -> None:
    assert verifiers.__all__ == sorted(verifiers.__all__)
    assert {"choice", "countdown", "exact", "isolated", "math", "numeric", "regex"} < set(verifiers.__all__)
    assert all(callable(getattr(verifiers, name)) for name in verifiers.__all__)


@pytest.mark.parametrize(
    ("text", "answer", "options", "score"),
    [
        ("12459", "12459", {}, 1.0),
        (" 12459\n", "12459", {}, 1.0),
        (" 12459\n", "12459", {"strip": False}, 0.0),
        ("12459", " 12459 ", {}, 1.0),
        ("12495", "12459", {}, 0.0),
        ("Yes", "yes", {}, 0.0),
        ("STRASSE", "straße", {"ignore_case": True}, 1.0),
        ("first\n42\n\n", "42", {"last_line": True}, 1.0),
        ("42\nfirst", "42", {"last_line": True}, 0.0),
        ("first\n42", "42", {}, 0.0),
        ("", "42", {"last_line": True}, 0.0),
        ("", "", {}, 1.0),
    ],
)
def test_exact(text: str, answer: str, options: dict[str, bool], score: float) -> None:
    assert exact(text, answer, **options) == score


@pytest.mark.parametrize(
    ("text", "answer", "score"),
    [
        ("12459", "12459", 1.0),
        ("12495", "12459", 0.6),
        ("1245", "12459", 0.8),  # cut short
        ("1245912459", "12459", 0.5),  # running on does not pay
        ("x", "12459", 0.0),
        ("", "12459", 0.0),
        ("12459", "", 0.0),
        ("", "", 1.0),
        (" 12\n", "12", 1.0),
    ],
)
def test_position_match(text: str, answer: str, score: float) -> None:
    assert position_match(text, answer) == pytest.approx(score, abs=1e-12)


@given(st.text(), st.text())
def test_position_match_is_a_share_and_is_one_only_for_the_answer(text: str, answer: str) -> None:
    share = position_match(text, answer, strip=False)
    assert 0.0 <= share <= 1.0
    assert (share == 1.0) == (text == answer) == (exact(text, answer, strip=False) == 1.0)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("42", "42"),
        ("the answer is 42.", "42"),
        ("The answer...42", "42"),
        ("6 * 7 = 42", "42"),
        ("42 (not 41)", "41"),  # the last number counts
        ("-3", "-3"),
        ("= -3", "-3"),
        ("\u22123", "-3"),  # the typographic minus
        ("+3", "3"),
        ("5-3", "3"),  # a subtraction, not minus three
        ("- 42", "42"),  # a list item, not minus forty-two
        ("0.5", ".5"),
        ("1,234,567", "1234567"),
        ("1{,}234", "1234"),
        ("-1,234.50", "-1234.5"),
        ("1,2", "2"),  # two numbers
        ("12,34", "34"),
        ("1/2", "0.5"),
        ("-3/4", "-0.75"),
        ("\\frac{3}{4}", "0.75"),
        ("-\\dfrac{3}{4}", "-3/4"),
        ("50%", "0.5"),
        ("50 \\%", "50%"),
        ("6.02e23", "602000000000000000000000"),
        ("1.5E-3", "0.0015"),
        ("$5", "5"),
        ("-$5", "-5"),
        ("€ 1,000", "1000"),
        ("5kg", "5"),
        ("x2 = 7", "7"),
        ("7 = x2", "7"),  # digits within a word are no number
        ("7, as of 1.2.3", "1.2"),
        ("\\boxed{42}, of 100", "42"),
        ("\\boxed{1} then \\boxed{\\frac{1}{2}}.", "1/2"),
        ("\\boxed{42} or \\boxed{}", "42"),
        ("\\boxed{42} or \\boxed{43", "42"),
        ("2 + 2 #### 4", "4"),
        ("#### 1,000 #### 4", "4"),
        ("\\boxed{3} #### 4", "3"),
        ("0.30000000000000004", "0.3"),
        ("007", "7"),
        ("-0", "0"),
    ],
)
def test_numeric_reads(text: str, answer: str) -> None:
    assert numeric(text, answer) == 1.0


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("41", "42"),
        ("42", "-42"),
        ("0.3333", "1/3"),
        ("50", "50%"),
        ("12345678901234567890123456789012345678901", "12345678901234567890123456789012345678902"),
        ("1e400", "1"),  # larger than any float
        ("1e-400", "1"),
    ],
)
def test_numeric_tells_apart(text: str, answer: str) -> None:
    assert numeric(text, answer, relative=0.0) == 0.0


@pytest.mark.parametrize(
    ("text", "options", "score"),
    [
        ("0.3333", {"tolerance": 1e-3}, 1.0),
        ("0.3333", {"tolerance": 1e-5}, 0.0),
        ("0.3333", {"relative": 1e-3}, 1.0),
        ("0.3333", {"relative": 1e-5}, 0.0),
        ("0.3333", {"tolerance": 1e-3, "relative": 1e-9}, 1.0),  # the larger of the two
        ("1/3", {"relative": 0.0, "last_number": False}, 1.0),
        (" $1/3$. ", {"last_number": False}, 1.0),
    ],
)
def test_numeric_options(text: str, options: dict[str, float], score: float) -> None:
    assert numeric(text, "1/3", **options) == score  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "options", "feedback"),
    [
        ("", {}, "no number in the response ''"),
        ("no idea", {}, "no number in the response 'no idea'"),
        ("nan", {}, "no number in the response 'nan'"),
        ("inf", {}, "no number in the response 'inf'"),
        ("1/0", {}, "no number in the response '1/0'"),
        ("0/0", {}, "no number in the response '0/0'"),
        ("1e99999999999", {}, "no number in the response '1e99999999999'"),
        ("it is 42", {"last_number": False}, "more than a number, or none, in the response 'it is 42'"),
        ("a" * 500, {}, "no number in the response '..." + "a" * 77 + "'"),
    ],
)
def test_a_response_that_cannot_be_read_has_failed_and_trains_as_the_minimum(
    text: str, options: dict[str, bool], feedback: str
) -> None:
    assert numeric(text, "42", **options) == Verdict(  # type: ignore[arg-type]
        kind=VerdictKind.SUBJECT_FAILED, score=0.0, feedback=feedback
    )


@pytest.mark.parametrize("answer", ["", "nan", "inf", "-inf", "about 42", "4 2", "1/0", "x"])
def test_an_answer_that_is_no_number_is_the_datas_fault_and_never_the_responses(answer: str) -> None:
    with pytest.raises(DataError, match=r"numeric: the answer .* is not one finite number; write it as a number"):
        numeric("42", answer)


@pytest.mark.parametrize("options", [{"tolerance": -1.0}, {"relative": float("nan")}, {"tolerance": float("inf")}])
def test_a_tolerance_that_makes_no_sense_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match="give finite numbers of at least 0"):
        numeric("42", "42", **options)  # type: ignore[arg-type]


@given(st.one_of(FINITE, st.integers(), st.decimals(allow_nan=False, allow_infinity=False)))
def test_a_number_as_python_writes_it_is_read_as_itself(number: float) -> None:
    assert numeric(str(number), number, relative=0.0) == 1.0
    assert numeric(f"I think it is {number}.", str(number), relative=0.0) == 1.0


@given(st.integers(), st.integers())
def test_two_integers_are_equal_or_not_however_long(one: int, other: int) -> None:
    assert numeric(f"{one:,}", str(other), relative=0.0) == float(one == other)


@given(st.text() | st.text("0123456789.,/%eE+-$\\{}boxedfrac# \n"), st.booleans())
@example("\\boxed{" * 3 + "}", True)
@example("1e" + "9" * 30 + "/0", False)
def test_no_text_raises_and_every_score_is_zero_or_one(text: str, last_number: bool) -> None:
    verdict = numeric(text, "42", last_number=last_number)
    if isinstance(verdict, Verdict):
        assert (verdict.kind, verdict.score) == (VerdictKind.SUBJECT_FAILED, 0.0)
    else:
        assert verdict in (0.0, 1.0)


@pytest.mark.parametrize(
    "unit",
    [
        "\\boxed{",
        "1,000,",
        ",000",
        "9",
        "\\frac{",
        "\\frac{1}{",
        "{",
        "-",
        "1/",
        ".",
        "1.",
        "$",
        " ",
        "\\boxed{1}",
        "}",
    ],
)
def test_reading_a_hostile_text_ends(unit: str) -> None:
    """Quadratic reading would need hours here, far beyond the test's deadline."""
    text = unit * (400_000 // len(unit))
    assert numeric(text + " \\boxed{42}", "42") == 1.0
    for end in ("", "0", "."):
        numeric(text + end, "42")
        numeric(text + end, "42", last_number=False)
