"""The data that flows: prompts out, groups in, verdicts in, batches out.

All types are frozen, keyword-only structs of numpy arrays: msgspec makes one in a tenth of the time of a frozen
dataclass, and a rollout is made anew in every process. `msgspec.structs.replace` makes another with some fields
changed. Shape letters, used in every name: T tokens of a rollout's response, P tokens of a prompt, G rollouts of a
group, N tokens of a packed batch, S sequences in it, V vocabulary. Log-probabilities are natural logarithms (nats).
"""

from collections.abc import Mapping, Sequence
from enum import StrEnum
from hashlib import blake2b
from typing import Any, NamedTuple, NewType

import msgspec
import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]
Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]

WorkerId = NewType("WorkerId", str)  # unique in a run, stable over restarts: "generation-0"


class GroupId(NamedTuple):
    """One attempt at one draw. A draw keeps its index over attempts; an attempt is never repeated."""

    draw: int
    attempt: int

    def __str__(self) -> str:
        return f"draw {self.draw} attempt {self.attempt}"


class VersionRun(NamedTuple):
    """Tokens [start, end) of a rollout were sampled by this version of the weights."""

    version: int
    start: int
    end: int


class Prompt(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the data, tokenised when it was loaded."""

    id: str  # stable over runs: the row's `id` column, or "<file stem>:<row>"
    text: str  # what was tokenised: the string, or the chat template's output
    tokens_P: Ints
    answer: str | None = None
    row: Mapping[str, Any] = msgspec.field(default_factory=dict)  # further columns, plain JSON values


class VerdictKind(StrEnum):
    """Why a rollout has the score it has; a failed judge is never a score."""

    SCORED = "scored"
    SUBJECT_FAILED = "subject_failed"  # the answer is unparsable, crashes or exceeds its limits: trains as the minimum
    JUDGE_FAILED = "judge_failed"  # our worker, machine or library failed: no score, masked and counted


_KINDS = {kind.value: kind for kind in VerdictKind}


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What a verifier says of one rollout."""

    kind: VerdictKind
    score: float | None  # None exactly when the judge failed
    components: Mapping[str, float] = msgspec.field(default_factory=dict)  # named parts, kept apart, never pre-summed
    feedback: str = ""  # the cause, in words

    def __post_init__(self) -> None:
        if (self.score is None) != (self.kind is VerdictKind.JUDGE_FAILED):
            raise ValueError(f"a verdict of kind {self.kind.value} cannot carry score={self.score!r}")


class Rollout(msgspec.Struct, frozen=True, kw_only=True):
    """One response to a prompt, exactly as the engine sampled it. Nothing is ever re-tokenised."""

    tokens_T: Ints  # response tokens, the prompt not among them
    sampled_T: Bools  # False: injected or tool tokens, never trained
    behaviour_logprob_T: Floats  # nats, of the distribution that sampled; 0 where not sampled
    versions: tuple[VersionRun, ...]  # runs over T, without gap or overlap
    finish_reason: str  # "stop" | "length"
    seed: int
    verdict: Verdict | None = None

    def __len__(self) -> int:
        return len(self.tokens_T)

    @property
    def oldest_version(self) -> int:
        return min(run.version for run in self.versions)

    def version_T(self) -> Ints:
        """The version of each token, [T]."""
        return np.repeat(
            np.array([run.version for run in self.versions], np.int32),
            [run.end - run.start for run in self.versions],
        )


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """All n rollouts of one attempt at a draw: leased, judged, taken and trained together."""

    id: GroupId
    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    lease_epoch: int

    @property
    def tokens(self) -> int:
        """Generated tokens of the group."""
        return sum(len(rollout) for rollout in self.rollouts)

    @property
    def oldest_version(self) -> int:
        return min(rollout.oldest_version for rollout in self.rollouts)


class Lease(msgspec.Struct, frozen=True, kw_only=True):
    """The right, and duty, of one worker to generate one group."""

    id: GroupId
    prompt: Prompt
    n: int  # rollouts
    seeds: tuple[int, ...]  # one per rollout
    min_version: int  # no first token is sampled below it
    epoch: int  # fences the worker that holds it


class GroupVerdict(msgspec.Struct, frozen=True, kw_only=True):
    """The verdicts of one group, in the order of its rollouts."""

    id: GroupId
    verdicts: tuple[Verdict, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        """One call instead of one for each rollout: verdicts cross processes with every group."""
        return _unpickled, (*self.id, [(v.kind.value, v.score, v.components, v.feedback) for v in self.verdicts])


def _unpickled(draw: int, attempt: int, verdicts: Sequence[tuple[str, float | None, Any, str]]) -> GroupVerdict:
    return GroupVerdict(
        id=GroupId(draw, attempt),
        verdicts=tuple(
            [
                Verdict(kind=_KINDS[kind], score=score, components=components, feedback=feedback)
                for kind, score, components, feedback in verdicts
            ]
        ),
    )


def seed_of(run_seed: int, draw: int, variation: int, member: int) -> int:
    """The sampling seed of one rollout, 31 bits, independent of worker and time.

    The variation grows when an attempt ends for what was sampled, and stays when a machine failed: the same draw is
    then sampled again with the same seeds.

    >>> seed_of(0, 1, 0, 0) == seed_of(0, 1, 0, 0) != seed_of(0, 1, 1, 0)
    True
    """
    digest = blake2b(f"{run_seed}/{draw}/{variation}/{member}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1


def rollouts_of(groups: Sequence[Group]) -> list[Rollout]:
    """All rollouts, group by group."""
    return [rollout for group in groups for rollout in group.rollouts]
