"""Every way a verifier can fail is a judge failure with its cause, never a score."""

import asyncio
import json
import threading
import time
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from millrace.core.catalogue import Method
from millrace.core.errors import ConfigError, DataError, DeadlineError, RewardError
from millrace.core.types import Ints, Prompt, Rollout, Verdict, VerdictKind, VersionRun
from millrace.rewards.config import JudgeConfig
from millrace.rewards.judge import Judge, verifier


def decode(tokens: Sequence[Ints]) -> list[str]:
    return ["".join(chr(97 + token) for token in one) for one in tokens]


def rollout(*tokens: int, finish_reason: str = "stop") -> Rollout:
    n = len(tokens)
    return Rollout(
        tokens_T=np.array(tokens, np.int32),
        sampled_T=np.ones(n, np.bool_),
        behaviour_logprob_T=np.zeros(n, np.float32),
        versions=(VersionRun(0, 0, n),),
        finish_reason=finish_reason,
        seed=0,
    )


PROMPT = Prompt(id="p7", text="sort ba", tokens_P=np.array([1, 0], np.int32), answer="ab", row={"level": 3})


def method(function: Any, *needs: str, is_async: bool = False) -> Method:
    return Method(function.__name__, function, needs or ("text",), {}, {}, is_async, RewardError)


def judged(function: Any, *needs: str, is_async: bool = False, rollouts: Any = None, **config: Any) -> list[Verdict]:
    judge = Judge(method(function, *needs, is_async=is_async), decode=decode, config=JudgeConfig(**config))
    return list(asyncio.run(judge(PROMPT, rollouts or [rollout(0, 1)])))


def test_words_are_filled_in_by_name_and_columns_do_not_hide_them() -> None:
    seen = []

    def score(level: int, text: str, answer: str, prompt: str, tokens_T: Ints, finish_reason: str, row: Any) -> float:
        seen.append((level, text, answer, prompt, tokens_T.tolist(), finish_reason, row))
        return 1.0

    judged(score, "level", "text", "answer", "prompt", "tokens_T", "finish_reason", "row")
    assert seen == [(3, "ab", "ab", "sort ba", [0, 1], "stop", {"level": 3})]


@pytest.mark.parametrize(
    ("value", "expected"), [(1, 1.0), (0.25, 0.25), (np.float32(0.5), 0.5), (np.int64(1), 1.0)], ids=str
)
def test_numbers_are_scores(value: Any, expected: float) -> None:
    (verdict,) = judged(lambda text: value)
    assert (verdict.kind, verdict.score) == (VerdictKind.SCORED, expected)


def test_numbers_of_a_verdict_become_plain_ones_which_the_journal_can_write() -> None:
    given = Verdict(kind=VerdictKind.SCORED, score=np.float32(0.5), components={"format": np.int64(1)})  # type: ignore[arg-type]
    (verdict,) = judged(lambda text: given)
    assert json.loads(json.dumps([verdict.score, dict(verdict.components)])) == [0.5, {"format": 1.0}]


def test_a_mapping_keeps_its_components_apart() -> None:
    (verdict,) = judged(lambda text: {"score": 0.5, "format": 1, "length": -3.0})
    assert verdict.score == 0.5
    assert verdict.components == {"format": 1.0, "length": -3.0}


def test_a_subject_failure_is_a_score_and_a_judge_failure_is_not() -> None:
    subject = Verdict(kind=VerdictKind.SUBJECT_FAILED, score=0.0, feedback="no number")
    assert judged(lambda text: subject) == [subject]
    (least,) = judged(lambda text: subject, lowest=-1.0)
    assert least.score == -1.0  # a wrong answer may score less than 0; not to be readable must not pay
    ours = Verdict(kind=VerdictKind.JUDGE_FAILED, score=None, feedback="service down")
    (verdict,) = judged(lambda text: ours)
    assert verdict.kind is VerdictKind.JUDGE_FAILED
    assert "service down" in verdict.feedback


@pytest.mark.parametrize(("value", "score"), [(True, 1.0), (np.bool_(False), 0.0), (1, 1.0), (np.float32(0.5), 0.5)])
def test_a_truth_value_or_any_real_number_is_a_score(value: Any, score: float) -> None:
    (verdict,) = judged(lambda text: value)
    assert (verdict.kind, verdict.score) == (VerdictKind.SCORED, score)


class Unreadable:
    """What a hostile or half-made reward object may be."""

    def __repr__(self) -> str:
        raise ValueError("no repr")


BAD = [
    ("yes", "'yes': what it returned is a str"),
    (None, "None: what it returned is a NoneType"),
    (float("nan"), "nan: what it returned is not finite"),
    (float("inf"), "inf: what it returned is not finite"),
    (np.array([0.5]), "is a ndarray"),
    (1.5, "outside [0, 1]"),
    (-0.1, "outside [0, 1]"),
    ({"format": 1.0}, "needs a component 'score'"),
    ({"score": "high"}, "component 'score' is a str"),
    ({"score": 0.5, "format": float("nan")}, "component 'format' is not finite"),
    (Verdict(kind=VerdictKind.SCORED, score=float("nan")), "the verdict's score is not finite"),
    (Verdict(kind=VerdictKind.SCORED, score=7.0), "outside [0, 1]"),
    (float("-inf"), "-inf: what it returned is not finite"),
    (1e30, "outside [0, 1]"),
    (10**400, "what it returned is not finite"),
    (10**5000, "a int that cannot be shown: what it returned is not finite"),
    (Fraction(10**400), "what it returned is not finite"),
    (0.5 + 0j, "what it returned is a complex"),
    (np.complex64(1), "what it returned is a complex64"),
    (np.float16("nan"), "what it returned is not finite"),
    (np.float64("inf"), "what it returned is not finite"),
    (np.array(0.5), "is a ndarray"),
    (np.str_("1.0"), "is a str"),
    (b"1", "is a bytes"),
    (Unreadable(), "a Unreadable that cannot be shown"),
    ({"score": Unreadable()}, "cannot be shown"),
    (replace(Verdict(kind=VerdictKind.SCORED, score=0.5), components=None), "reward function mine"),  # type: ignore[arg-type]  # user code may
    (replace(Verdict(kind=VerdictKind.SCORED, score=0.5), feedback=Unreadable()), "reward function mine"),  # type: ignore[arg-type]  # user code may
    (Verdict(kind=VerdictKind.SCORED, score="1"), "the verdict's score is a str"),  # type: ignore[arg-type]  # user code may
]


@pytest.mark.parametrize(
    ("value", "message"), BAD, ids=[f"{i}-{type(value).__name__}" for i, (value, _) in enumerate(BAD)]
)
def test_what_is_no_score_is_a_judge_failure_that_names_function_value_and_prompt(value: Any, message: str) -> None:
    def mine(text: str) -> Any:
        return value

    (verdict,) = judged(mine)
    assert (verdict.kind, verdict.score) == (VerdictKind.JUDGE_FAILED, None)
    assert message in verdict.feedback
    assert "reward function mine" in verdict.feedback
    assert "'p7'" in verdict.feedback


def test_what_it_raises_is_a_judge_failure_whoever_raises_it() -> None:
    def ours(text: str) -> float:
        raise DataError("the answer is not a number")

    def theirs(text: str) -> float:
        return 1 / 0

    def leaves(text: str) -> float:
        raise SystemExit(3)

    async def asynchronous(text: str) -> float:
        raise KeyError("x")

    causes = {
        ours: "the answer is not a number; prompt 'p7'",
        theirs: "reward function theirs raised ZeroDivisionError: division by zero; prompt 'p7'",
        leaves: "reward function leaves called exit(3)",
    }
    for function, cause in causes.items():
        (verdict,) = judged(function)
        assert verdict.kind is VerdictKind.JUDGE_FAILED
        assert cause in verdict.feedback
    (verdict,) = judged(asynchronous, is_async=True)
    assert "raised KeyError: 'x'" in verdict.feedback


def test_the_feedback_of_a_failure_keeps_the_traceback_of_the_users_code() -> None:
    def helper(text: str) -> float:
        return float({}[text])

    def mine(text: str) -> float:
        return helper(text)

    async def later(text: str) -> float:
        return helper(text)

    for function, is_async in ((mine, False), (later, True)):
        (verdict,) = judged(function, is_async=is_async)
        first, *tail = verdict.feedback.splitlines()
        assert "raised KeyError: 'ab'; prompt 'p7'" in first
        assert "return helper(text)" in verdict.feedback and "return float({}[text])" in verdict.feedback
        assert tail[-1] == "KeyError: 'ab'"
        assert "rewards/judge.py" not in verdict.feedback


def test_a_long_failure_is_cut_in_its_middle() -> None:
    def mine(text: str) -> float:
        raise ValueError("x" * 100_000 + "the end")

    (verdict,) = judged(mine)
    assert len(verdict.feedback) < 5000
    assert verdict.feedback.startswith("reward function mine raised") and verdict.feedback.endswith("xthe end")


@pytest.mark.parametrize("raised", [KeyboardInterrupt, GeneratorExit, asyncio.CancelledError, SystemExit])
@pytest.mark.parametrize("is_async", [False, True])
def test_endings_that_are_no_exception_are_judge_failures_and_end_nothing(raised: Any, is_async: bool) -> None:
    def mine(text: str) -> float:
        raise raised()

    async def later(text: str) -> float:
        raise raised()

    verdicts = judged(later if is_async else mine, is_async=is_async, rollouts=[rollout(0)] * 3)
    assert [verdict.kind for verdict in verdicts] == [VerdictKind.JUDGE_FAILED] * 3
    assert not any("took longer" in verdict.feedback for verdict in verdicts)


def test_an_async_function_that_cancels_itself_does_not_cancel_the_worker() -> None:
    async def mine(text: str) -> float:
        raise asyncio.CancelledError

    (verdict,) = judged(mine, is_async=True)
    assert "cancelled itself" in verdict.feedback


def test_a_column_that_the_row_lacks_is_named() -> None:
    (verdict,) = judged(lambda colour: 1.0, "colour")
    assert "asks for 'colour', which this row does not have; prompt 'p7'" in verdict.feedback


def test_a_plain_function_that_returns_a_coroutine_is_awaited() -> None:
    async def inner() -> float:
        return 0.75

    (verdict,) = judged(lambda text: inner())
    assert verdict.score == 0.75


@pytest.mark.parametrize("is_async", [False, True])
def test_one_that_hangs_fails_alone_and_in_time(is_async: bool) -> None:
    release = threading.Event()

    def slow(text: str) -> float:
        if text == "b":
            release.wait(30)
        return 1.0

    async def slow_too(text: str) -> float:
        if text == "b":
            await asyncio.sleep(30)
        return 1.0

    function = slow_too if is_async else slow
    verdicts = judged(
        function, is_async=is_async, rollouts=[rollout(0), rollout(1), rollout(2), rollout(3)], deadline_s=0.2
    )
    release.set()
    assert [verdict.score for verdict in verdicts] == [1.0, None, 1.0, 1.0]
    assert "took longer than rewards.deadline_s = 0.2" in verdicts[1].feedback


def test_slow_synchronous_verdicts_overlap() -> None:
    together = threading.Barrier(3)  # passes only when three calls are under way at the same time

    def waits(text: str) -> float:
        if text == "a":
            time.sleep(0.05)  # no longer quick: the rest go to threads of their own
        else:
            together.wait(30)
        return 1.0

    rollouts = [rollout(0), rollout(1), rollout(1), rollout(1)]
    assert [v.score for v in judged(waits, rollouts=rollouts, deadline_s=20)] == [1.0] * 4


def test_a_slow_first_verdict_does_not_hold_the_others_of_its_group() -> None:
    together = threading.Barrier(4)  # the first response of the group is one of the four

    def waits(text: str) -> float:
        together.wait(20)
        return 1.0

    assert [v.score for v in judged(waits, rollouts=[rollout(0)] * 4, deadline_s=20)] == [1.0] * 4


def test_concurrency_is_bounded() -> None:
    now = most = 0

    async def counts(text: str) -> float:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0)
        now -= 1
        return 1.0

    judged(counts, is_async=True, rollouts=[rollout(0)] * 12, concurrency=3)
    assert most == 3


def test_threads_that_hang_for_good_are_bounded_and_blame_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next response is not judged to be anything: the worker is given up, and another process judges it."""
    monkeypatch.setattr("millrace.rewards.threads.MOST_HANGING", 3)
    release = threading.Event()

    def hangs(text: str) -> float:
        if text == "a":
            release.wait(30)
        return 1.0

    async def scenario() -> list[Verdict]:
        judge = Judge(method(hangs), decode=decode, config=JudgeConfig(deadline_s=0.02, concurrency=2))
        verdicts = [verdict for _ in range(3) for verdict in await judge(PROMPT, [rollout(0)])]
        with pytest.raises(DeadlineError, match="3 calls of reward function hangs passed their deadline and never re"):
            await judge(PROMPT, [rollout(1)])
        return verdicts

    verdicts = asyncio.run(scenario())
    release.set()
    assert all("took longer" in verdict.feedback for verdict in verdicts)


def test_a_call_that_returns_late_gives_its_thread_back() -> None:
    release = threading.Event()

    def once(text: str) -> float:
        if text == "b":
            release.wait(30)
        return 1.0

    async def scenario() -> list[float | None]:
        judge = Judge(method(once), decode=decode, config=JudgeConfig(deadline_s=0.1, concurrency=1))
        (late,) = await judge(PROMPT, [rollout(1)])
        release.set()
        for _ in range(1000):
            (after,) = await judge(PROMPT, [rollout(0)])
            if after.score is not None:
                return [late.score, after.score]
            await asyncio.sleep(0.001)
        return []

    assert asyncio.run(scenario()) == [None, 1.0]


def test_failures_in_a_row_end_the_run_with_the_first_cause() -> None:
    def mine(text: str) -> float:
        return 1 / 0

    with pytest.raises(RewardError) as caught:
        judged(mine, rollouts=[rollout(0)] * 5, max_judge_failures=5)
    message = str(caught.value)
    for part in ("5 judge failures in a row", "reward function mine", "division by zero", "'p7'", "return 1 / 0"):
        assert part in message


def test_one_score_among_them_does_not_end_it_and_all_is_counted() -> None:
    def mine(text: str) -> float:
        return 1.0 if text == "a" else float(text)

    async def scenario() -> Judge:
        judge = Judge(method(mine), decode=decode, config=JudgeConfig(max_judge_failures=3))
        for _ in range(4):
            await judge(PROMPT, [rollout(1), rollout(1), rollout(0)])
        return judge

    judge = asyncio.run(scenario())
    assert judge.counts == {"scored": 4, "subject_failed": 0, "judge_failed": 8, "in_a_row": 0}
    assert "could not convert string to float: 'b'" in judge.first_failure


def test_one_row_that_always_fails_does_not_end_a_run_that_works() -> None:
    """All 16 rollouts of a group, judged twice at each of three attempts, are one prompt's failures."""

    def mine(text: str, level: int) -> float:
        return 1 / level

    def of(id: str, level: int) -> Prompt:
        return replace(PROMPT, id=id, row={"level": level})

    async def scenario() -> None:
        judge = Judge(method(mine, "text", "level"), decode=decode, config=JudgeConfig(max_judge_failures=4))
        await judge(of("right", 1), [rollout(0)])
        for _ in range(6):
            await judge(of("bad", 0), [rollout(0)] * 16)
        for other in ("b", "c"):
            await judge(of(other, 0), [rollout(0)])
        with pytest.raises(RewardError, match="99 judge failures in a row, of 4 prompts") as caught:
            await judge(of("d", 0), [rollout(0)])
        assert "rewards.max_judge_failures = 4" in str(caught.value)

    asyncio.run(scenario())


def test_the_range_is_the_configuration_s() -> None:
    assert judged(lambda text: -1.0, lowest=-1.0)[0].score == -1.0
    with pytest.raises(ConfigError, match="lowest first"):
        JudgeConfig.parse({"lowest": 1.0}, source="run.toml")


def test_a_verifier_is_resolved_with_the_columns_of_the_data(tmp_path: Any) -> None:
    (tmp_path / "mine.py").write_text("def score(text, level):\n    return 1.0 if level == 3 else 0.0\n")
    found = verifier(f"{tmp_path}/mine.py:score", columns=["level"])
    judge = Judge(found, decode=decode, config=JudgeConfig())
    assert asyncio.run(judge(PROMPT, [rollout(0)]))[0].score == 1.0
    with pytest.raises(RewardError, match="'level'"):
        verifier(f"{tmp_path}/mine.py:score")
