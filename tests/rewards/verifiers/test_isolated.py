"""Any verifier in a killable process: same words, same answers."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from millrace.core.errors import RewardError
from millrace.core.types import Prompt, Rollout, Verdict, VerdictKind, VersionRun
from millrace.rewards import processes
from millrace.rewards.config import JudgeConfig
from millrace.rewards.judge import Judge, verifier

MINE = """
import ctypes, os, signal
from millrace.core.types import Verdict, VerdictKind

def score(text, level, tokens_T, answer="none", *, bonus=0.0):
    if text == "hang":
        return 9 ** 9 ** 9 ** 9
    if text == "parts":
        return {"score": 0.5, "format": tokens_T.sum()}
    if text == "verdict":
        return Verdict(kind=VerdictKind.SUBJECT_FAILED, score=0.0, components={"a": 1.0}, feedback="why")
    if text == "raise":
        raise KeyError("x")
    if text == "exit at once":
        os._exit(7)
    if text == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if text == "segfault":
        ctypes.string_at(0)
    if text == "deaf":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        return 9 ** 9 ** 9 ** 9
    if text == "nan":
        return float("nan")
    if text == "text":
        return "1.0"
    return (level + bonus) / 10 if answer == "none" else 1.0

async def later(text):
    return 1.0
"""


@pytest.fixture
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(processes, "STARVED", 0.0)
    (tmp_path / "mine.py").write_text(MINE)
    made = []

    def make(inner: Any = None, columns: Any = ("level",), **settings: Any) -> Any:
        inner = inner or {"name": f"{tmp_path}/mine.py:score", "bonus": 1.0}
        made.append(verifier({"name": "isolated", "verifier": inner, **settings}, columns=columns))
        return made[-1]

    yield make
    for method in made:
        method.function._pool.close()


PROMPT = Prompt(id="p7", text="", tokens_P=np.array([1], np.int32), answer=None, row={"level": 4})
EMPTY = Rollout(
    tokens_T=np.array([1, 2], np.int32),
    sampled_T=np.ones(2, np.bool_),
    behaviour_logprob_T=np.zeros(2, np.float32),
    versions=(VersionRun(0, 0, 2),),
    finish_reason="stop",
    seed=0,
)


def have(text: str, **more: Any) -> dict[str, Any]:
    return {"text": text, "level": 4, "tokens_T": np.array([1, 2], np.int32), **more}


def test_it_asks_for_the_words_of_the_verifier_it_runs(isolated: Any) -> None:
    method = isolated()
    assert method.needs == ("text", "level", "tokens_T") and dict(method.optional) == {"answer": "none"}
    assert method.call(have("x")) == 0.5
    assert method.call(have("x", answer="a")) == 1.0
    with pytest.raises(RewardError, match="'level'"):
        isolated(columns=())


def test_what_it_returns_comes_back(isolated: Any) -> None:
    method = isolated()
    assert method.call(have("parts")) == {"score": 0.5, "format": 3}
    expected = Verdict(kind=VerdictKind.SUBJECT_FAILED, score=0.0, components={"a": 1.0}, feedback="why")
    assert method.call(have("verdict")) == expected


def test_what_it_raises_is_a_judge_failure_and_what_hangs_is_the_subject_s(isolated: Any) -> None:
    method = isolated(deadline_s=1.0)
    with pytest.raises(RewardError, match="raised KeyError: 'x'"):
        method.call(have("raise"))
    verdict = method.call(have("hang"))
    assert verdict.kind is VerdictKind.SUBJECT_FAILED and "took longer than deadline_s = 1" in verdict.feedback
    assert method.call(have("x")) == 0.5


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("exit at once", "ended with exit code 7"),
        ("kill", "killed by SIGKILL"),
        ("segfault", "killed by SIGSEGV"),
        ("deaf", "took longer than deadline_s = 1"),
    ],
)
def test_a_check_that_kills_its_process_or_holds_it_is_a_verdict_and_the_judge_goes_on(
    isolated: Any, text: str, cause: str
) -> None:
    """Through the judge, as a reward worker calls it: typed, with its cause, and the next response is judged."""
    method = isolated(deadline_s=1.0)
    judge = Judge(method, decode=lambda responses: [text, "x"][: len(responses)], config=JudgeConfig(deadline_s=60))
    killed, after = asyncio.run(judge(PROMPT, [EMPTY, EMPTY]))
    assert (killed.kind, killed.score) == (VerdictKind.SUBJECT_FAILED, 0.0)
    assert cause in killed.feedback
    assert (after.kind, after.score) == (VerdictKind.SCORED, 0.5)


@pytest.mark.parametrize(("text", "cause"), [("nan", "not finite"), ("text", "is a str"), ("raise", "KeyError: 'x'")])
def test_what_is_no_score_is_typed_on_this_side_of_the_process(isolated: Any, text: str, cause: str) -> None:
    judge = Judge(isolated(), decode=lambda responses: [text], config=JudgeConfig())
    (verdict,) = asyncio.run(judge(PROMPT, [EMPTY]))
    assert (verdict.kind, verdict.score) == (VerdictKind.JUDGE_FAILED, None)
    assert cause in verdict.feedback and "'p7'" in verdict.feedback.splitlines()[0]


def test_a_pattern_that_never_ends_is_ended(isolated: Any) -> None:
    method = isolated({"name": "regex", "pattern": "(a+)+b"}, deadline_s=1.0)
    assert method.call({"text": "aab"}) == 1.0
    assert method.call({"text": "a" * 60}).kind is VerdictKind.SUBJECT_FAILED


def test_mistakes_are_found_when_the_recipe_is_read(isolated: Any, tmp_path: Path) -> None:
    for inner, message in (
        ("exakt", "unknown verifier 'exakt'; did you mean 'exact'"),
        ({"name": "exact", "stripp": True}, "did you mean 'strip'"),
        (f"{tmp_path}/mine.py:later", "is async"),
    ):
        with pytest.raises(RewardError, match=message):
            isolated(inner)
