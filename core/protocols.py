"""What each step expects of the next. All calls are async, because every one of them may cross a machine.

Every request to the queue names its worker and that worker's epoch, and may be repeated: a repeated
`request` id gets the same answer. A call of an ended epoch raises `Fenced`. Calls that wait (`lease_draws`,
`lease_groups`, `take`) return empty-handed after `wait_s` seconds; the caller calls again.

Groups cross machines as a *pack*: one Arrow record batch, see core/schema.py.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

import msgspec

from millrace.core.schema import Pack
from millrace.core.types import Floats, GroupId, GroupVerdict, Ints, Lease, Prompt, Rollout, WorkerId


class Role(StrEnum):
    GENERATION = "generation"
    REWARD = "reward"
    LEARNER = "learner"


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """The answer to `lease_draws`."""

    leases: Sequence[Lease]
    newest_version: int  # of the weights; -1 before the first is announced
    idle: str = ""  # why fewer than wanted were granted, with the numbers; "" when all were
    finished: bool = False  # the run needs no further draws


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to one put group."""

    id: GroupId
    accepted: bool  # it is stored, by this call or by the one that it repeats; False: fenced, or bad
    reason: str = ""

    def __reduce__(self) -> tuple[Any, ...]:
        """One for every group of a pack: as little as possible is pickled by name."""
        return _receipt, (*self.id, self.accepted, self.reason)


def _receipt(draw: int, attempt: int, accepted: bool, reason: str) -> Receipt:
    return Receipt(id=GroupId(draw, attempt), accepted=accepted, reason=reason)


@dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    """The answer to a heartbeat."""

    fenced: Sequence[GroupId]  # stop working on these: their leases ended
    newest_version: int
    stop: bool = False  # the run is over


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumption:
    """Where a learner that joins begins: the last commit, or the start."""

    epoch: int
    step: int  # optimiser steps in the surviving history
    version: int  # reserved for the weights the learner starts from; publish and announce it first
    directory: str | None = None  # of the committed checkpoint
    digest: str | None = None
    earlier: Sequence[int] = ()  # steps of older commits that `revert` can fall back to, newest first


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """The recorded batch of one step, in order. The same for every repetition of the call."""

    step: int
    pack: Pack  # groups, see core/schema.py
    verdicts: Sequence[GroupVerdict]  # in the order of the pack
    lag: Sequence[Sequence[int]]  # per group, per version run in rollout order: lag of these tokens, in versions
    masked: bool = False  # the stale rule `mask`: tokens with lag > max_lag leave the loss
    uses: Sequence[int] = ()  # in the order of the pack: 0 is a group's first use, more where groups are reused
    idle_s: Mapping[str, float] = field(default_factory=dict)  # seconds `take` waited for this step, in all, by IDLE


@dataclass(frozen=True, slots=True, kw_only=True)
class Feedback:
    """What the learner tells the ledger about a step: sums for the books, and what curricula learn from."""

    trained_tokens: int
    masked_tokens: int = 0
    reused_tokens: int | None = None  # of trained_tokens, those of further uses; None: shared out in proportion
    scores: Mapping[str, float] = field(default_factory=dict)  # prompt id -> mean score


# What a wait is for: prompts that are still generated, verdicts, a version of the weights, or the rules' permission.
IDLE = ("data", "judge", "weights", "scheduler")


@dataclass(frozen=True, slots=True, kw_only=True)
class Quarantined:
    """A draw that is dead, and why: its prompt crashed, failed or hung whoever worked on it."""

    draw: int
    attempt: int  # the last
    prompt: str  # its id
    cause: str  # "crashed", "hung", "judge_crashed", "engine", "judge", "invalid", "expired", ...
    times: int  # it failed so
    traceback: str  # of the last time; "" where the process left none
    workers: Sequence[str]  # that failed on it, oldest first


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueStatus:
    """A consistent picture of the ledger."""

    step: int  # trained
    committed_step: int
    newest_version: int
    states: Mapping[str, int]  # draws by state
    tokens: Mapping[
        str, int
    ]  # the waste ledger: row -> tokens; all but "reused" add up to "generated", the sum of the engines' counters
    lag_histogram: Mapping[int, int]  # trained rollouts by lag of their oldest token
    idle: Mapping[str, str]  # worker -> what it waits for
    calls: Mapping[str, int]  # requests answered, by method
    idle_causes: Mapping[str, str] = field(default_factory=dict)  # worker -> one of IDLE
    quarantined: int = 0  # draws
    commits: Sequence[int] = ()  # steps of the checkpoints that the run can fall back to, newest last
    checkpoint: str | None = None  # directory of the last commit


class PromptSource(Protocol):
    """What is drawn next. Plain, deterministic, inside the queue's transaction domain."""

    def draw(self, index: int) -> Prompt:
        """The prompt of draw `index`. The same index gives the same prompt."""
        ...


class Queue(Protocol):
    """The ledger and the replay queue, one transaction domain."""

    async def join(self, worker: WorkerId, *, role: Role, slots: int, generated: int = 0) -> int:
        """Enter or re-enter the run; `generated` is what the engine's own counter shows already.

        Returns the worker's new epoch; leases of its earlier one are fenced.
        """
        ...

    async def leave(self, worker: WorkerId, *, epoch: int, generated: int, abandoned: Mapping[GroupId, int]) -> None:
        """Leave in order: the engine's final counter, and tokens of groups it gives up."""
        ...

    async def lease_draws(
        self, worker: WorkerId, *, epoch: int, version: int, want: int, request: str, wait_s: float
    ) -> Grant:
        """Draws to generate; also returns, empty-handed, when a newer version than `version` is announced."""
        ...

    async def put_groups(self, worker: WorkerId, *, epoch: int, pack: Pack, request: str) -> Sequence[Receipt]:
        """Accept finished groups; durable when it returns. Never waits for room: the lease reserved it."""
        ...

    async def fail_groups(self, worker: WorkerId, *, epoch: int, failures: Mapping[GroupId, str], request: str) -> None:
        """The engine failed on these groups; the values are tracebacks. Each counts towards `attempts`."""
        ...

    async def fence(self, worker: WorkerId, *, cause: str, traceback: str = "") -> Sequence[GroupId]:
        """This worker's process is gone: it "crashed", or "hung" and was killed. Its leases end at once.

        Returns what it held.

        What it worked on goes to others, counted towards `crashes` and not towards `attempts`. A repetition, or an
        unknown worker, does nothing; a later `join` begins anew.
        """
        ...

    async def lease_groups(self, worker: WorkerId, *, epoch: int, want: int, request: str, wait_s: float) -> Pack:
        """A pack of generated groups to judge; b"" when there is none after `wait_s`."""
        ...

    async def put_verdicts(
        self, worker: WorkerId, *, epoch: int, verdicts: Sequence[GroupVerdict], request: str
    ) -> Sequence[Receipt]: ...

    async def heartbeat(
        self, worker: WorkerId, *, epoch: int, progress: Mapping[GroupId, int], generated: int
    ) -> Orders:
        """Tokens so far of each group in hand, and the engine's own counter of all tokens it ever generated."""
        ...

    async def join_learner(self) -> Resumption:
        """A new learner epoch. Steps after the last commit will be redone with their recorded batches."""
        ...

    async def take(self, *, step: int, epoch: int, wait_s: float) -> Taken | None: ...

    async def filtered(self, *, step: int, epoch: int, groups: Mapping[GroupId, str]) -> None:
        """Take these groups out of step's batch, each by the named rule; the next `take` of it refills."""
        ...

    async def trained(self, *, step: int, epoch: int, feedback: Feedback) -> int:
        """The optimiser step was made. Returns the version reserved for the weights after it."""
        ...

    async def announce(self, *, version: int, epoch: int) -> None:
        """The weights of this version can be fetched."""
        ...

    async def commit(self, *, step: int, directory: str, digest: str, epoch: int) -> None:
        """Move the checkpoint pointer and all trained groups of steps < `step` in one compare-and-set."""
        ...

    async def revert(self, *, step: int) -> None:
        """Fall back to an older commit, when the last one cannot be read. A learner joins afterwards."""
        ...

    async def status(self) -> QueueStatus: ...

    async def quarantined(self, *, after: int) -> Sequence[Quarantined]:
        """All draws that died, oldest first, without the first `after`."""
        ...

    async def stalled(self) -> str:
        """What everything waits for, in a few lines: draw, prompt, worker, since when, and what to do."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are sampled. Whatever the learner cannot reproduce is refused in training."""

    max_tokens: int
    temperature: float = 1.0
    stop_token_ids: tuple[int, ...] = ()  # the sampled stop token is part of the response


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """Where one parameter lies in the flat buffer."""

    name: str  # as in `named_parameters` of the Hugging Face model, ties once
    dtype: str  # "float32" | "bfloat16" | "float16"
    shape: tuple[int, ...]
    offset: int  # bytes
    size: int  # bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A sequence and its log-probabilities under the published weights, at temperature 1."""

    tokens_T: Ints
    logprob_T: Floats  # nats, of tokens_T[1:] given what precedes; one shorter than tokens_T


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """How the tensors of a manifest make whole weights: W = W_base + scale * W.lora_B @ W.lora_A, in float32."""

    base: str  # identity of the weights that they belong to, see core/weights.py
    scale: float
    dtype: str  # of the whole weights: what engines compute in


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    version: int
    step: int  # optimiser steps made
    epoch: int  # of the learner
    tensors: tuple[Tensor, ...]
    digest: str  # of the buffer, see core/weights.py
    probes: tuple[Probe, ...] = ()
    tolerance: float = 1e-4  # nats, on probes
    adapter: Adapter | None = None  # None: the tensors are the whole weights


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightHandle:
    """Published weights, on this machine's disk, ready to be mapped."""

    manifest: Manifest
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """What an engine answers after loading weights."""

    version: int
    digest: str  # of the bytes it read
    consumed: frozenset[str]  # parameter names
    probe_gap: float | None = None  # largest |difference| in nats; None where the probes were not asked for
    pause_s: float = 0.0  # how long generation stood still


class Engine(Protocol):
    """An inference engine. `name` keys of a call are free; progress is reported under them."""

    async def sample(self, tokens_P: Ints, *, sampling: Sampling, seeds: Sequence[int], key: str) -> Sequence[Rollout]:
        """One rollout per seed, all of one prompt. Versions and behaviour log-probabilities per token."""
        ...

    async def load(self, weights: WeightHandle, *, prove: bool) -> Proof:
        """Swap the weights within running generations. Raises WeightsError when the proof fails."""
        ...

    async def score(self, tokens_T: Ints) -> Floats:
        """Log-probabilities of tokens_T[1:], at temperature 1, nats."""
        ...

    async def abort(self, key: str) -> None:
        """Give up a running `sample`; its awaiter gets EngineError."""
        ...

    @property
    def version(self) -> int:
        """Of the weights it holds; -1 before the first load."""
        ...

    @property
    def generated(self) -> int:
        """All response tokens it ever sampled, by its own count."""
        ...

    @property
    def aborted(self) -> int:
        """Of these, the tokens of calls that were given up."""
        ...

    def progress(self) -> Mapping[str, int]:
        """Tokens sampled so far, by key of the running calls."""
        ...

    @property
    def unfinished(self) -> int:
        """Responses of the running calls that go on: a call returns with its last one, slots fall free before."""
        ...

    async def watch(self) -> None:
        """Wait until the engine is gone, also while nobody calls it, and raise EngineDeadError; never returns."""
        ...

    async def close(self) -> None: ...


class Packing(Protocol):
    """Weights that are about to be published. They stay as they are until that is done."""

    @property
    def size(self) -> int:
        """Bytes."""
        ...

    def pour(self, write: Callable[[memoryview], object]) -> None:
        """All bytes, in order and in parts. May be repeated, where the first time went wrong."""
        ...

    def manifest(self, digest: str) -> Manifest:
        """Of bytes with this digest."""
        ...


class WeightStore(Protocol):
    """Holds the last published versions of the weights; outlives the learner."""

    async def pour(self, packing: Packing) -> Manifest:
        """Publish a new version; its manifest."""
        ...

    async def fetch(self, version: int) -> WeightHandle:
        """The handle of `version`, or of the newest if that one is gone. Waits for neither."""
        ...

    async def newer(self, *, than: int, wait_s: float) -> WeightHandle | None:
        """The newest version, as soon as it is above `than`; None after `wait_s` seconds without one."""
        ...


Clock = Callable[[], float]  # monotonic seconds; tests replace it
