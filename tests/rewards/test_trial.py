"""A verifier that fails on the data's own answers is known before a run."""

import time
from typing import Any

import numpy as np
import pytest

from millrace.core.catalogue import Method
from millrace.core.errors import RewardError
from millrace.core.types import Prompt
from millrace.rewards.config import JudgeConfig
from millrace.rewards.trial import ROWS, tried


def rows(*answers: str | None) -> list[Prompt]:
    return [Prompt(id=f"row:{at}", text="", tokens_P=np.zeros(1, np.int32), answer=a) for at, a in enumerate(answers)]


def method(function: Any, *, is_async: bool = False) -> Method:
    return Method("mine.py:score", function, ("text", "answer"), {}, {}, is_async, RewardError)


def test_what_always_fails_is_said_with_its_cause() -> None:
    def score(text: str, answer: str) -> float:
        return missing_name  # type: ignore[name-defined]  # noqa: F821

    said = tried(method(score), rows(*"abcdef"), JudgeConfig())
    assert said.startswith(f"of the first {ROWS} rows' own answers {ROWS} could not be judged: ")
    assert "mine.py:score raised NameError: name 'missing_name' is not defined; prompt 'row:0'" in said
    assert "return missing_name" in said


@pytest.mark.parametrize("is_async", [False, True])
def test_the_own_answer_is_the_response_and_rows_without_one_are_left_out(is_async: bool) -> None:
    seen: list[tuple[str, str]] = []

    def score(text: str, answer: str) -> float:
        seen.append((text, answer))
        return 1.0

    async def later(text: str, answer: str) -> float:
        return score(text, answer)

    assert tried(method(later if is_async else score, is_async=is_async), rows("a", None, "b"), JudgeConfig()) == ""
    assert seen == [("a", "a"), ("b", "b")]
    assert tried(method(score), rows(None), JudgeConfig()) == ""


def test_one_that_takes_its_time_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("millrace.rewards.trial.DEADLINE_S", 0.05)
    called: list[str] = []

    def score(text: str, answer: str) -> float:
        called.append(text)
        time.sleep(0.3)
        return 1.0

    assert tried(method(score), rows("a", "b"), JudgeConfig()) == ""
    assert called == ["a"]
