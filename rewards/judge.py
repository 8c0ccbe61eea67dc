"""Applies a verifier to the rollouts of a prompt. Whatever goes wrong is attributed, and is never a score.

A verifier asks for words: `text` (the response), `answer`, `prompt` (its text), `tokens_T`, `finish_reason`,
`row` (the further columns), or the name of a further column. It returns a number, a Verdict, or a mapping of
named components among which `score` is the reward.
"""

import asyncio
import math
import time
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from millrace.core import catalogue
from millrace.core.catalogue import Method, Spec, resolve
from millrace.core.errors import MillraceError, RewardError, boundary
from millrace.core.types import Ints, Prompt, Rollout, Verdict, VerdictKind
from millrace.rewards.config import JudgeConfig
from millrace.rewards.threads import Hanging, InTurn, Threads

WORDS = ("text", "answer", "prompt", "tokens_T", "finish_reason", "row")
FOLDER = "millrace.rewards.verifiers"
QUICK_S = 0.02
FEEDBACK_BYTES = 4096  # of a judge failure, its traceback among them
_HERE = Path(__file__).parent
# Frames of no interest to who wrote the verifier.
OURS = (
    __file__,
    str(_HERE / "threads.py"),
    catalogue.__file__,
    str(_HERE / "processes.py"),
    str(_HERE / "verifiers" / "isolation.py"),
)
# They are no Exception: in a thread they would end it without an answer, in a task the whole worker.
ENDINGS = (SystemExit, KeyboardInterrupt, GeneratorExit)

Decode = Callable[[Sequence[Ints]], Sequence[str]]


class Judge:
    """One verifier, bounded in concurrency and time, with its failures counted."""

    def __init__(self, method: Method, *, decode: Decode, config: JudgeConfig) -> None:
        """
        Args:
            method: the resolved verifier, see `verifier`.
            decode: token arrays -> texts, special tokens left out.
        """
        self._method = method
        self._whose = f"reward function {method.name}"
        self._decode = decode
        self._config = config
        self._at_once = asyncio.Semaphore(config.concurrency)
        self._threads = Threads(whose=self._whose)
        self._counts: Counter[str] = Counter()
        self._in_a_row = 0
        self._failing: set[str] = set()  # prompts of the failures in a row
        self._first = ""

    async def __call__(
        self, prompt: Prompt, rollouts: Sequence[Rollout], judged: Callable[[], None] = lambda: None
    ) -> tuple[Verdict, ...]:
        """The verdicts, in the order of the rollouts.

        Args:
            judged: called after each.
        Raises:
            RewardError: `max_judge_failures` in a row, with the first one's cause.
            Hanging: of too many calls; what is judged by a new process is not affected.
        """
        texts = self._decode([rollout.tokens_T for rollout in rollouts])
        given = [_words(prompt, rollout, text) for rollout, text in zip(rollouts, texts, strict=True)]
        if self._method.is_async:
            return tuple(await asyncio.gather(*(self._one(prompt, have, judged) for have in given)))
        first, late = InTurn(given), asyncio.Event()
        quick = asyncio.create_task(self._quick_ones(prompt, first, judged, late))
        try:
            await late.wait()
            others = asyncio.gather(*(self._one(prompt, have, judged) for have in first.leave()))
            verdicts, rest = await asyncio.gather(quick, others)
        finally:
            quick.cancel()
        return (*verdicts, *rest)

    @property
    def counts(self) -> Mapping[str, int]:
        """Verdicts by kind, and how many judge failures came last without a score between them."""
        return {**{kind.value: self._counts[kind.value] for kind in VerdictKind}, "in_a_row": self._in_a_row}

    @property
    def first_failure(self) -> str:
        """The cause of the first judge failure, in full; empty when there was none."""
        return self._first

    async def _one(self, prompt: Prompt, have: Mapping[str, Any], judged: Callable[[], None]) -> Verdict:
        async with self._at_once:
            value, error = None, None
            try:
                if self._method.is_async:
                    value = await self._within_deadline(self._called_here(have))
                else:
                    value = await self._within_deadline(self._threads.run(lambda: self._called(have)))
            except Hanging:
                raise
            except MillraceError as caught:
                error = caught
            verdict = await self._verdict(prompt, value, error)
        judged()
        return verdict

    async def _quick_ones(
        self, prompt: Prompt, first: InTurn, judged: Callable[[], None], late: asyncio.Event
    ) -> list[Verdict]:
        """The first few, one after another in one thread, while they are quick.

        A thread's round trip costs more than most verdicts. As soon as `QUICK_S` have passed, within a slow one or
        after several, `late` is set and the rest go each to a thread of its own.
        """
        answers: list[tuple[Any, MillraceError | None]] = []
        limit_s = min(QUICK_S, self._config.deadline_s / 2)

        def several() -> None:
            end = time.monotonic() + limit_s
            while time.monotonic() < end and (have := first.next()) is not None:
                try:
                    answers.append((self._called(have), None))
                except MillraceError as caught:
                    answers.append((None, caught))

        try:
            async with self._at_once:
                asyncio.get_running_loop().call_later(2 * limit_s, late.set)
                try:
                    await self._within_deadline(self._threads.run(several))
                    got = list(answers)
                except Hanging:
                    raise
                except MillraceError as caught:
                    first.leave()
                    got = [*answers, (None, caught)]  # the one that it hung in
                verdicts = [await self._verdict(prompt, value, error) for value, error in got]
        finally:
            late.set()
        for _ in verdicts:
            judged()
        return verdicts

    async def _verdict(self, prompt: Prompt, value: Any, error: MillraceError | None) -> Verdict:
        try:
            if error is not None:
                raise error
            if isinstance(value, Awaitable):  # a plain function that returned a coroutine
                value = await self._within_deadline(self._awaited(value))
            with boundary(f"reading what {self._whose} returned", RewardError):
                verdict = self._read(value)
        except MillraceError as caught:
            return self._failed(prompt, str(caught), caught)
        if verdict.kind is VerdictKind.JUDGE_FAILED:
            return self._failed(prompt, f"{self._whose} gave no verdict: {verdict.feedback}")
        self._in_a_row = 0
        self._failing.clear()
        self._counts[verdict.kind.value] += 1
        return verdict

    async def _called_here(self, have: Mapping[str, Any]) -> Any:
        self._check_words(have)
        return await self._awaited(self._method.call(have))

    async def _awaited(self, value: Awaitable[Any]) -> Any:
        try:
            with boundary(self._whose, RewardError):
                return await value
        except ENDINGS as caught:
            raise self._ended(caught) from caught

    def _called(self, have: Mapping[str, Any]) -> Any:
        self._check_words(have)
        try:
            with boundary(self._whose, RewardError):
                return self._method.call(have)
        except (*ENDINGS, asyncio.CancelledError) as caught:
            raise self._ended(caught) from caught

    def _ended(self, caught: BaseException) -> RewardError:
        if isinstance(caught, SystemExit):
            return RewardError(f"{self._whose} called exit({caught.code!r})")
        return RewardError(f"{self._whose} raised {type(caught).__name__}: {caught}")

    def _check_words(self, have: Mapping[str, Any]) -> None:
        for word in self._method.needs:
            if word not in have:
                raise RewardError(f"{self._whose} asks for {word!r}, which this row does not have")

    async def _within_deadline(self, call: Coroutine[Any, Any, Any]) -> Any:
        """A task of its own, left behind when it overruns: user code may swallow a cancellation."""
        task = asyncio.get_running_loop().create_task(call)
        try:
            done, _ = await asyncio.wait({task}, timeout=self._config.deadline_s)
        except asyncio.CancelledError:
            task.cancel()
            raise
        if not done:
            task.cancel()
            raise RewardError(
                f"{self._whose} took longer than rewards.deadline_s = {self._config.deadline_s:g}; a plain function"
                " cannot be interrupted: one that may hang is written rewards.verifier ="
                ' { name = "isolated", verifier = ... }'
            )
        if task.cancelled():
            raise RewardError(f"{self._whose} cancelled itself")
        return task.result()

    def _read(self, value: Any) -> Verdict:
        if isinstance(value, Verdict):
            # Numbers of other libraries would not survive the journal.
            score = None if value.score is None else self._check(value.score, "the verdict's score")
            components = {
                str(name): self._number(part, f"component {name!r}") for name, part in value.components.items()
            }
            if value.kind is VerdictKind.SUBJECT_FAILED:
                score = self._config.lowest  # or hanging the judge would pay, where wrong answers have less than 0
            return msgspec.structs.replace(value, score=score, components=components, feedback=str(value.feedback))
        if isinstance(value, Mapping):
            if "score" not in value:
                raise RewardError(f"{self._whose} returned {_shown(value)}: a mapping needs a component 'score'")
            components = {str(name): self._number(part, f"component {name!r}") for name, part in value.items()}
            score = self._check(components.pop("score"), "component 'score'")
            return Verdict(kind=VerdictKind.SCORED, score=score, components=components)
        return Verdict(kind=VerdictKind.SCORED, score=self._check(self._number(value, "what it returned"), "the score"))

    def _number(self, value: Any, what: str) -> float:
        if not isinstance(value, Real | np.bool_):
            raise RewardError(
                f"{self._whose} returned {_shown(value)}: {what} is a {type(value).__name__}, not a number; "
                "return a float, a Verdict, or a mapping of floats with 'score'"
            )
        try:
            number = float(value)
        except OverflowError:  # an integer or a fraction beyond the largest float
            number = math.inf
        if not math.isfinite(number):
            raise RewardError(f"{self._whose} returned {_shown(value)}: {what} is not finite")
        return number

    def _check(self, score: float, what: str) -> float:
        low, high = self._config.lowest, self._config.highest
        score = self._number(score, what)
        if not low <= score <= high:
            raise RewardError(
                f"{self._whose} returned {score!r}: {what} lies outside [{low:g}, {high:g}]; return a score within, "
                "or set rewards.lowest and rewards.highest to the range it has"
            )
        return score

    def _failed(self, prompt: Prompt, cause: str, caught: MillraceError | None = None) -> Verdict:
        """A failure. Once something was scored, those of one prompt count once: its row alone may be at fault."""
        first, newline, rest = cause.partition("\n")
        cause = f"{first}; prompt {prompt.id!r}{newline}{rest}{_tail(caught)}"
        if len(cause) > FEEDBACK_BYTES:
            cause = f"{cause[: FEEDBACK_BYTES // 2]} ... {cause[-FEEDBACK_BYTES // 2 :]}"
        self._counts[VerdictKind.JUDGE_FAILED.value] += 1
        self._in_a_row += 1
        self._failing.add(prompt.id)
        if not self._first:
            self._first = cause
        works = self._counts[VerdictKind.SCORED.value] + self._counts[VerdictKind.SUBJECT_FAILED.value] > 0
        if (len(self._failing) if works else self._in_a_row) >= self._config.max_judge_failures:
            raise RewardError(
                f"{self._in_a_row} judge failures in a row, of {len(self._failing)} prompts, and not one score among"
                f" them (rewards.max_judge_failures = {self._config.max_judge_failures}). The first of the run:"
                f" {self._first}"
            )
        return Verdict(kind=VerdictKind.JUDGE_FAILED, score=None, feedback=cause)


def verifier(spec: Spec, *, columns: Sequence[str] = ()) -> Method:
    """The verifier that a recipe names.

    Args:
        spec: a name of rewards/verifiers/, `"file.py:function"` or `"package.module:function"`, or a table.
        columns: further columns of the data, which it may ask for too.
    Raises:
        RewardError: it cannot be imported, or asks for what the data lack.
    """
    return resolve(spec, folder=FOLDER, words=(*WORDS, *columns), slot="verifier", error=RewardError)


def _words(prompt: Prompt, rollout: Rollout, text: str) -> Mapping[str, Any]:
    """What a verifier may ask for; a column does not hide a word."""
    words = {
        **prompt.row,
        "text": text,
        "prompt": prompt.text,
        "tokens_T": rollout.tokens_T,
        "finish_reason": rollout.finish_reason,
        "row": prompt.row,
    }
    return words if prompt.answer is None else words | {"answer": prompt.answer}


def _shown(value: Any) -> str:
    """The start of what it looks like; the repr of a user's class, or of a huge integer, may raise."""
    try:
        with boundary("repr", RewardError):
            text = repr(value)
    except RewardError:
        return f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= 80 else text[:77] + "..."


def _tail(caught: MillraceError | None) -> str:
    """The last frames of the user's own code, and what it raised."""
    if caught is None:
        return ""
    raised = caught.__cause__ or caught
    frames = [each for each in traceback.extract_tb(raised.__traceback__) if each.filename not in OURS]
    if not frames:
        return ""
    lines = [*traceback.format_list(frames[-2:]), *traceback.format_exception_only(raised)]
    return "\n" + "".join(lines).rstrip()
