"""Mathematical equivalence, and what becomes of checks that do not end."""

import asyncio
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import psutil
import pytest

from millrace.core.errors import DataError, RewardError
from millrace.core.types import Ints, Prompt, Rollout, Verdict, VerdictKind, VersionRun
from millrace.rewards import processes
from millrace.rewards.config import JudgeConfig
from millrace.rewards.judge import Judge, verifier
from millrace.rewards.verifiers import math

HANGS = r"\boxed{9^{9^{9^{9}}}}"


@pytest.fixture(scope="module")
def check() -> Iterator[math]:
    one = math(deadline_s=60.0)
    yield one
    one._pool.close()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[math]:
    """With a short deadline, which a busy machine does not excuse."""
    monkeypatch.setattr(processes, "STARVED", 0.0)
    one = math(deadline_s=1.0, processes=2)
    yield one
    one._pool.close()


@pytest.mark.parametrize(
    ("text", "answer", "score"),
    [
        (r"\boxed{\frac{1}{2}}", "0.5", 1.0),
        (r"so it is $\frac{2}{4}$.", "1/2", 1.0),
        ("the answer is 42", "42", 1.0),
        ("first 41, then 42", "42", 1.0),
        ("first 42, then 41", "42", 0.0),
        (r"\boxed{41}, or rather \boxed{42}", "42", 1.0),
        (r"\boxed{41}, and 42 is not it", "42", 0.0),
        (r"\boxed{(x+1)^2}", "x^2+2x+1", 1.0),
        (r"\boxed{(x-1)^2}", "x^2+2x+1", 0.0),
        (r"\boxed{2^{1/2}}", r"$\sqrt{2}$", 1.0),
        (r"\boxed{2, 1}", r"\{1, 2\}", 1.0),
        (r"\boxed{50\%}", "0.5", 1.0),
        (r"\boxed{x = 10}", "10", 1.0),
        (r"\boxed{\text{East}}", r"\text{east}", 1.0),
        (r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}", "3", 0.0),  # kinds that cannot be compared
        ("1,234", "1234", 1.0),
    ],
)
def test_equivalence(check: math, text: str, answer: str, score: float) -> None:
    assert check(text, answer) == score


@pytest.mark.parametrize("text", ["", "no idea", r"\boxed{}", "." * 10_000])
def test_a_response_without_an_expression_is_its_own_fault(check: math, text: str) -> None:
    verdict = check(text, "42")
    assert isinstance(verdict, Verdict) and verdict.kind is VerdictKind.SUBJECT_FAILED
    assert "no expression in the response" in verdict.feedback


def test_only_a_box_counts_where_the_recipe_says_so() -> None:
    strict = math(boxed=True)
    verdict = strict("42", "42")
    assert isinstance(verdict, Verdict) and verdict.feedback == "no \\boxed{} in the response '42'"
    assert strict(r"\boxed{42}", "42") == 1.0
    strict._pool.close()


@pytest.mark.parametrize("answer", ["", "???", "   "])
def test_an_answer_that_cannot_be_read_is_named_and_is_not_the_response_s_fault(check: math, answer: str) -> None:
    with pytest.raises(DataError, match="the answer .* cannot be read"):
        check("42", answer)


def test_a_check_that_hangs_is_killed_and_other_verdicts_are_not_touched(quick: math) -> None:
    assert quick("1", "1") == 1.0
    (pid,) = quick._pool.pids
    others: list[Any] = []
    thread = threading.Thread(target=lambda: others.extend(quick(rf"\boxed{{{i}}}", str(i)) for i in range(30)))
    hung: list[Any] = []
    hanging = threading.Thread(target=lambda: hung.append(quick(HANGS, "1")))
    hanging.start()
    thread.start()
    thread.join()
    hanging.join()
    assert others == [1.0] * 30
    assert hung[0].kind is VerdictKind.SUBJECT_FAILED and "took longer than deadline_s = 1" in hung[0].feedback
    assert not psutil.pid_exists(pid)  # the one that was free took the first request
    assert quick(r"\boxed{7}", "7") == 1.0


def test_a_gold_answer_whose_reading_hangs_is_the_row_s_fault(quick: math) -> None:
    with pytest.raises(DataError, match="its reading took longer"):
        quick("1", "9^{9^{9^{9}}}!")


def test_a_process_that_is_killed_from_outside_costs_no_verdict(check: math) -> None:
    check("1", "1")
    for pid in check._pool.pids:
        os.kill(pid, signal.SIGKILL)
    assert check("1", "1") == 1.0


def test_a_missing_library_is_a_judge_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "math_verify.py").write_text("raise ImportError('not installed here')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RewardError, match="did not start: .*not installed here"):
        math()("1", "1")


def texts(tokens: Sequence[Ints]) -> list[str]:
    return [[HANGS, r"\boxed{1}", r"\boxed{2}", "none"][one[0]] for one in tokens]


def rollout(token: int) -> Rollout:
    return Rollout(
        tokens_T=np.array([token], np.int32),
        sampled_T=np.ones(1, np.bool_),
        behaviour_logprob_T=np.zeros(1, np.float32),
        versions=(VersionRun(0, 0, 1),),
        finish_reason="stop",
        seed=0,
    )


def judged(answer: str, tokens: Sequence[int]) -> list[Verdict]:
    method = verifier({"name": "math", "deadline_s": 1.0, "processes": 2})
    judge = Judge(method, decode=texts, config=JudgeConfig(lowest=-1.0, concurrency=4))
    prompt = Prompt(id="p7", text="", tokens_P=np.array([1], np.int32), answer=answer)
    verdicts = list(asyncio.run(judge(prompt, [rollout(token) for token in tokens])))
    method.function._pool.close()  # type: ignore[attr-defined]
    return verdicts


def test_the_judge_scores_the_group_around_a_response_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "STARVED", 0.0)
    verdicts = judged("1", [1, 0, 2, 3, 1, 0])
    assert [verdict.score for verdict in verdicts] == [1.0, -1.0, 0.0, -1.0, 1.0, -1.0]
    kinds = [verdict.kind.value for verdict in verdicts]
    assert kinds == ["scored", "subject_failed", "scored", "subject_failed", "scored", "subject_failed"]


def test_the_judge_masks_a_row_whose_answer_cannot_be_read() -> None:
    verdicts = judged("???", [1, 2])
    assert {verdict.kind for verdict in verdicts} == {VerdictKind.JUDGE_FAILED}
    assert "the answer '???' cannot be read" in verdicts[0].feedback and "'p7'" in verdicts[0].feedback
