"""Held-out evaluation at a pinned version, outside ledger and lag.

The judge is handed in: judging belongs to rewards/, which this folder does not know.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from math import comb
from typing import Any

from millrace.actors.adapters import whole_weights
from millrace.actors.config import EvaluationConfig
from millrace.actors.engines import engine as build_engine
from millrace.actors.weights import check_names
from millrace.core.calls import persist, together
from millrace.core.errors import ConfigError, DataError, EngineDeadError, EngineError, WeightsError
from millrace.core.protocols import Clock, Engine, Proof, Sampling, WeightHandle, WeightStore
from millrace.core.types import Prompt, Rollout, Verdict, VerdictKind, WorkerId
from millrace.core.weights import VersionGoneError

SILENCE_S = 60.0  # how long the weight store may fail to answer

Judge = Callable[[Prompt, Sequence[Rollout]], Sequence[Verdict] | Awaitable[Sequence[Verdict]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What one evaluation found. Judge failures are in `invalid`, never in a mean."""

    version: int  # of the weights, held fixed
    step: int  # optimiser steps made before that version
    prompts: int  # with at least one valid score
    samples: int  # asked for per prompt
    mean: float  # mean@n: over prompts, of the mean over a prompt's valid samples
    pass_at_k: Mapping[int, float]  # k -> unbiased estimate, over prompts with at least k valid samples
    scores: Mapping[str, tuple[float | None, ...]]  # prompt id -> score of each member; None: no verdict
    invalid: int  # samples without a score
    causes: Mapping[str, int] = field(default_factory=dict)  # why they have none -> how many, the commonest few
    tokens: int = 0  # generated
    length: float = 0.0  # mean tokens of a response
    seconds: float = 0.0


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The probability that at least one of k responses is correct, estimated without bias from n >= k.

        pass@k = 1 - C(n - c, k) / C(n, k)

    Source: Evaluating Large Language Models Trained on Code (Chen et al. 2021), arXiv:2107.03374, equation 1.

    Args:
        samples: n, responses drawn.
        correct: c of them correct.
        k: responses allowed, 1 <= k <= n.
    Returns:
        In [0, 1].
    Raises:
        ValueError: when the numbers do not fit.

    >>> pass_at_k(4, 2, 1), pass_at_k(4, 1, 4), pass_at_k(4, 0, 2)
    (0.5, 1.0, 0.0)
    """
    if not (1 <= k <= samples and 0 <= correct <= samples):
        raise ValueError(f"pass@k needs 1 <= k <= n and 0 <= c <= n, got n = {samples}, c = {correct}, k = {k}")
    return 1.0 - comb(samples - correct, k) / comb(samples, k)


def evaluation_seed(seed: int, prompt_id: str, member: int) -> int:
    """The sampling seed of one member of one held-out prompt, 31 bits, the same in every evaluation.

    >>> evaluation_seed(0, "a", 0) == evaluation_seed(0, "a", 0) != evaluation_seed(0, "a", 1)
    True
    """
    digest = blake2b(f"evaluation/{seed}/{prompt_id}/{member}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True, slots=True)
class _Outcome:
    """One prompt's responses."""

    prompt: Prompt
    scores: tuple[float | None, ...]
    causes: tuple[str, ...]
    tokens: int
    responses: int


class Evaluator:
    """Samples held-out prompts with an engine of its own and has them judged."""

    def __init__(
        self,
        name: WorkerId,
        *,
        store: WeightStore,
        engine: Engine | Mapping[str, Any],
        prompts: Sequence[Prompt],
        judge: Judge,
        config: EvaluationConfig,
        clock: Clock = time.monotonic,
    ) -> None:
        """
        Args:
            engine: built here from {"name": ..., **options}, so that the arguments can cross a machine.
            judge: verdicts of the responses to one prompt, in their order; sync or async.
        Raises:
            DataError: without prompts, or with two of one id.
        """
        if not prompts:
            raise DataError(f"{name}: no held-out prompts: give evaluation a file with at least one row")
        twice = [key for key, times in Counter(prompt.id for prompt in prompts).items() if times > 1]
        if twice:
            raise DataError(f"{name}: held-out prompt id {twice[0]!r} stands more than once: ids must be unique")
        self._name = name
        self._store = whole_weights(store, engine)
        self._engine = _built(engine, name)
        self._prompts = prompts
        self._judge = judge
        self._config = config
        self._clock = clock
        self._one_at_a_time = asyncio.Lock()

    async def evaluate(self, version: int) -> Evaluation:
        """Evaluate `version`, or the newest if the store holds it no longer; the result says which.

        Raises:
            WeightsError: the engine does not hold what was published.
            EngineError: no prompt at all could be sampled; EngineDeadError: the engine is gone.
            DeadlineError: the weight store does not answer.
        """
        async with self._one_at_a_time:
            began = self._clock()
            weights, proof = await self._load(version)
            check_names(weights.manifest, proof.consumed)
            if (proof.version, proof.digest) != (weights.manifest.version, weights.manifest.digest):
                raise WeightsError(
                    f"{self._name}: the engine was to load version {weights.manifest.version}, digest "
                    f"{weights.manifest.digest[:12]}, and answers {proof.version}, {proof.digest[:12]}: restart it"
                )
            at_once = asyncio.Semaphore(max(1, -(-self._config.slots // self._config.samples)))
            async with together() as tasks:
                running = [tasks.create_task(self._one(prompt, proof.version, at_once)) for prompt in self._prompts]
            return self._summary(
                [task.result() for task in running],
                version=proof.version,
                step=weights.manifest.step,
                seconds=self._clock() - began,
            )

    async def status(self) -> Mapping[str, Any]:
        return {"version": self._engine.version, "generated": self._engine.generated}

    async def close(self) -> None:
        await self._engine.close()

    async def _load(self, version: int) -> tuple[WeightHandle, Proof]:
        weights = await self._fetch(version)
        try:
            return weights, await self._engine.load(weights, prove=True)
        except VersionGoneError:  # the store moved on in between: it has a newer one
            weights = await self._fetch(version)
            return weights, await self._engine.load(weights, prove=True)

    async def _fetch(self, version: int) -> WeightHandle:
        return await persist(
            lambda: self._store.fetch(version),
            what=f"{self._name}: weights of version {version}",
            remedy="Look at the weight store's process.",
            deadline_s=SILENCE_S,
        )

    async def _one(self, prompt: Prompt, version: int, at_once: asyncio.Semaphore) -> _Outcome:
        config = self._config
        sampling = Sampling(
            max_tokens=config.max_tokens, temperature=config.temperature, stop_token_ids=config.stop_token_ids
        )
        seeds = [evaluation_seed(config.seed, prompt.id, member) for member in range(config.samples)]
        async with at_once:
            try:
                rollouts = await self._engine.sample(prompt.tokens_P, sampling=sampling, seeds=seeds, key=prompt.id)
            except EngineDeadError:
                raise
            except EngineError as caught:
                cause = f"engine: {caught}"
                return _Outcome(prompt, (None,) * config.samples, (cause,) * config.samples, 0, 0)
        moved = {run.version for rollout in rollouts for run in rollout.versions} - {version}
        if moved:
            raise WeightsError(
                f"{self._name}: prompt {prompt.id!r} was sampled with version {min(moved)} during the evaluation of "
                f"version {version}: the engine is shared, give the evaluator one of its own"
            )
        answer = self._judge(prompt, rollouts)
        verdicts = await answer if isinstance(answer, Awaitable) else answer
        failed = [verdict.feedback for verdict in verdicts if verdict.kind is VerdictKind.JUDGE_FAILED]
        return _Outcome(
            prompt,
            tuple(verdict.score for verdict in verdicts),
            tuple(failed),
            sum(len(rollout) for rollout in rollouts),
            len(rollouts),
        )

    def _summary(self, outcomes: Sequence[_Outcome], *, version: int, step: int, seconds: float) -> Evaluation:
        config = self._config
        valid = [[score for score in outcome.scores if score is not None] for outcome in outcomes]
        responses = sum(outcome.responses for outcome in outcomes)
        causes = Counter(cause for outcome in outcomes for cause in outcome.causes)
        if not responses:
            raise EngineError(
                f"{self._name}: none of {len(outcomes)} held-out prompts could be sampled at version {version}; "
                f"first cause: {outcomes[0].causes[0]}"
            )
        means = [sum(scores) / len(scores) for scores in valid if scores]
        estimates = {}
        for k in config.pass_at:
            each = [
                pass_at_k(len(scores), sum(score >= config.correct_from for score in scores), k)
                for scores in valid
                if len(scores) >= k
            ]
            estimates[k] = sum(each) / len(each) if each else float("nan")
        return Evaluation(
            version=version,
            step=step,
            prompts=len(means),
            samples=config.samples,
            mean=sum(means) / len(means) if means else float("nan"),
            pass_at_k=estimates,
            scores={outcome.prompt.id: outcome.scores for outcome in outcomes},
            invalid=sum(score is None for outcome in outcomes for score in outcome.scores),
            causes=dict(causes.most_common(5)),
            tokens=sum(outcome.tokens for outcome in outcomes),
            length=sum(outcome.tokens for outcome in outcomes) / responses,
            seconds=seconds,
        )


def _built(engine: Engine | Mapping[str, Any], name: WorkerId) -> Engine:
    if not isinstance(engine, Mapping):
        return engine
    if "name" not in engine:
        raise ConfigError(f'{name}: the engine has no name: write engine = {{ name = "vllm", ... }}')
    return build_engine(**engine)
