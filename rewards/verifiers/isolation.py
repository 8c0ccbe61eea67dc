"""Any verifier in a process that is really killed."""

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import PositiveFloat, PositiveInt

from millrace.core.catalogue import Spec, resolve
from millrace.core.errors import RewardError
from millrace.core.types import Verdict, VerdictKind
from millrace.rewards.processes import Pool

FOLDER = "millrace.rewards.verifiers"


@dataclass
class isolated:
    """Another verifier, run in a process that is killed at its deadline: for code that may hang, eat memory or crash.

        r = verifier(words)     SUBJECT_FAILED when the check overruns or crashes its process

    Source: the limits that HumanEval (Chen et al. 2021), arXiv:2107.03374, section 2.3, sets to code under test.

    It asks for the words of the verifier it runs. What that verifier raises is a judge failure, as everywhere. The
    process is no sandbox: it may read and write files and use the network. Keep the reward workers' `deadline_s` above
    `concurrency / processes` times the one here, because checks wait for a free process.

    Args:
        verifier: a name of this catalogue, "file.py:function" or a table with settings; not async.
        deadline_s: wall time of one check.
        memory_bytes: what one check may allocate.
        processes: checks at the same time.
    Returns:
        What the verifier returns, or the verdict of a response whose check was killed.

    >>> verify = isolated(verifier={"name": "exact", "ignore_case": True})
    >>> verify("Four", "four")
    1.0
    """

    verifier: Spec
    deadline_s: PositiveFloat = 5.0
    memory_bytes: PositiveInt = 1 << 30
    processes: PositiveInt = 4

    def __post_init__(self) -> None:
        inner = resolve(self.verifier, folder=FOLDER, words=_Any(), slot="verifier", error=RewardError)
        if inner.is_async:
            raise RewardError(f"isolated: {inner.name} is async; what waits needs no process: use it as it stands")
        self._name = inner.name
        self._words = (*inner.needs, *inner.optional)
        # What it asks for is what the other asks for: the signature is how core/catalogue.py learns of it.
        self.__signature__ = inspect.Signature(
            [
                inspect.Parameter(
                    word,
                    inspect.Parameter.POSITIONAL_OR_KEYWORD,
                    default=inner.optional.get(word, inspect.Parameter.empty),
                )
                for word in self._words
            ]
        )
        self._pool = Pool(
            f"{__name__}:_checker",
            setup={"spec": self.verifier},
            deadline_s=self.deadline_s,
            memory_bytes=self.memory_bytes,
            processes=self.processes,
        )

    def __call__(self, *words: Any) -> Any:
        found = self._pool.run(dict(zip(self._words, words, strict=True)))
        if found.fault:
            return Verdict(
                kind=VerdictKind.SUBJECT_FAILED, score=0.0, feedback=f"the check by {self._name}: {found.fault}"
            )
        if isinstance(found.value, Mapping) and "verdict" in found.value:
            given = found.value["verdict"]
            return Verdict(**{**given, "kind": VerdictKind(given["kind"])})
        return found.value["returned"]


def _checker(spec: Spec) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """In the process: resolves the verifier again; words in, plain values out."""
    method = resolve(spec, folder=FOLDER, words=_Any(), slot="verifier", error=RewardError)

    def check(have: Mapping[str, Any]) -> dict[str, Any]:
        value = method.call(have)
        if not isinstance(value, Verdict):
            return {"returned": value}
        return {
            "verdict": {
                "kind": value.kind.value,
                "score": value.score,
                "components": dict(value.components),
                "feedback": str(value.feedback),
            }
        }

    return check


class _Any(Collection[str]):
    """Every word: which columns the data have is checked when this verifier is resolved itself."""

    def __contains__(self, word: object) -> bool:
        return True

    def __iter__(self) -> Any:
        return iter(())

    def __len__(self) -> int:
        return 0
