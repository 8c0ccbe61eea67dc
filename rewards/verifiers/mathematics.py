"""Verifiers that compare mathematics."""

from dataclasses import dataclass

from pydantic import PositiveFloat, PositiveInt

from millrace.core.errors import DataError
from millrace.core.types import Verdict, VerdictKind
from millrace.rewards.processes import Answer, Pool
from millrace.rewards.stated import boxed as last_box
from millrace.rewards.stated import shown

TAIL = 4000  # characters of a response without a \boxed{} that are searched for its last expression
KNOWN = 100_000  # answers of rows that are remembered as readable


@dataclass
class math:
    r"""1 when the response's expression is mathematically the answer's; checked in a process that is really killed.

        r = [x = a]     x in the last \boxed{}, else the last expression; equal as expressions, sets, intervals, ...

    Source: Math-Verify (Kydlicek 2025), the library that decides; as an outcome reward: Tulu 3 (Lambert et al. 2024),
    arXiv:2411.15124.

    A response in which nothing can be read, or whose check overruns `deadline_s` or `memory_bytes` or crashes the
    process (as 9^{9^{9^9}} does), is a SUBJECT_FAILED verdict: it trains as `rewards.lowest`. A row's answer that
    cannot be read is a judge failure which names it, as is a process that cannot start.

    Checks wait for a free process: keep the reward workers' `deadline_s` above `concurrency / processes` of the one
    here, which the defaults do.

    Args:
        text: the response, decoded.
        answer: the row's answer: LaTeX, with or without $ or \boxed{}, or a plain expression.
        boxed: only a \boxed{} counts; a response without one has failed.
        deadline_s: wall time of one check.
        memory_bytes: what one check may allocate.
        processes: checks at the same time; each holds about 100 MB.
    Returns:
        0.0 or 1.0, or the verdict of a response that cannot be judged.
    Raises:
        DataError: the row's answer cannot be read.

    >>> verify = math()
    >>> verify(r"So x is $\frac{2}{4}$.", "1/2"), verify(r"\boxed{x^2 + 2x + 1}", "(x+1)^2"), verify("41", "42")
    (1.0, 1.0, 0.0)
    >>> verify("no idea", "42").feedback
    "no expression in the response 'no idea'"
    """

    boxed: bool = False
    deadline_s: PositiveFloat = 3.0
    memory_bytes: PositiveInt = 1 << 30
    processes: PositiveInt = 4

    def __post_init__(self) -> None:
        self._readable: set[str] = set()
        self._pool = Pool(
            "millrace.rewards.equivalence:checker",
            setup={},
            deadline_s=self.deadline_s,
            memory_bytes=self.memory_bytes,
            processes=self.processes,
        )

    def __call__(self, text: str, answer: str) -> float | Verdict:
        self._check_gold(answer)
        box = last_box(text)
        if box is None and self.boxed:
            return _failed(f"no \\boxed{{}} in the response {shown(text)}")
        stated = text[-TAIL:] if box is None else f"\\boxed{{{box}}}"
        found = self._pool.run(("check", answer, stated))
        if found.fault:
            return _failed(f"the check of {shown(stated)} {_did(found)}")
        if found.value is None:
            return _failed(f"no expression in the response {shown(text)}")
        return float(found.value)

    def _check_gold(self, answer: str) -> None:
        if answer in self._readable:
            return
        found = self._pool.run(("gold", answer))
        if not found.value:
            why = f"its reading {_did(found)}" if found.fault else "it is no expression"
            raise DataError(
                f"math: the answer {shown(answer)} cannot be read: {why}; "
                "write it as LaTeX, or compare text with the verifier 'exact'"
            )
        if len(self._readable) >= KNOWN:
            self._readable.clear()
        self._readable.add(answer)


def _did(found: Answer) -> str:
    return found.fault if found.fault.startswith(("took", "ran", "nested")) else f"crashed its process: {found.fault}"


def _failed(cause: str) -> Verdict:
    return Verdict(kind=VerdictKind.SUBJECT_FAILED, score=0.0, feedback=cause)
