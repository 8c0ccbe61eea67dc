"""Held-out evaluation as a component, beside the loop and outside its ledger.

consumes       the weights of every k-th step, which the store holds for it
waits for      the next of them
unblocked by   publish

A version is let go when its evaluation was collected, so whoever takes over from a dead one makes again what was not.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from millrace.actors.config import EvaluationConfig
from millrace.actors.evaluation import Evaluation, Evaluator
from millrace.core.calls import persist
from millrace.core.errors import MillraceError
from millrace.core.types import Prompt, WorkerId
from millrace.core.weight_store import NodeStore
from millrace.rewards.worker import DeferredJudge

T = TypeVar("T")

POLL_S = 0.5
SILENCE_S = 60.0  # how long the weight store may fail to answer
RELEASE_S = 2.0  # at the end, when the run waits


class HeldOut:
    """Evaluates each version that the store holds for it, in order, and lets it go."""

    def __init__(
        self,
        name: WorkerId,
        *,
        store: NodeStore,
        engine: Mapping[str, Any],
        prompts: Sequence[Prompt],
        judge: DeferredJudge,
        config: EvaluationConfig,
    ) -> None:
        self._name = name
        self._store = store
        self._evaluator = Evaluator(name, store=store, engine=engine, prompts=prompts, judge=judge, config=config)
        self._done: list[Evaluation] = []
        self._versions: list[int] = []  # that each of them was held for
        self._collected = self._released = 0  # of these, from the first on
        self._finishing = asyncio.Event()

    async def run(self) -> None:
        """Evaluate until `finish` was called and all that is held is evaluated.

        Raises:
            WeightsError: the engine does not hold what was published.
            EngineError: no prompt at all could be sampled; EngineDeadError: the engine is gone.
            RewardError: the verifier fails again and again.
            DeadlineError: the weight store does not answer.
        """
        while True:
            finishing = self._finishing.is_set()
            await self._release()
            held = await self._answered(self._store.held, "held")
            due = [version for version in held if version not in self._versions]
            for version in due:
                self._done.append(await self._evaluator.evaluate(version))
                self._versions.append(version)
            if due:
                continue
            if finishing:
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):
                    await self._finishing.wait()

    async def finish(self) -> None:
        """No further version will be published; `run` returns when the last is evaluated."""
        self._finishing.set()

    async def results(self, *, after: int) -> Sequence[Evaluation]:
        """All evaluations but the first `after`, which the caller thereby says to have."""
        self._collected = max(self._collected, min(after, len(self._done)))
        return self._done[after:]

    async def close(self) -> None:
        """The run is over and has all results: let every version go, and end the engine."""
        self._collected = len(self._done)
        with suppress(MillraceError, TimeoutError):
            async with asyncio.timeout(RELEASE_S):
                await self._release()
        await self._evaluator.close()

    async def _release(self) -> None:
        while self._released < self._collected:
            version = self._versions[self._released]
            await self._answered(lambda: self._store.release(version), f"release of version {version}")  # noqa: B023
            self._released += 1

    async def _answered(self, call: Callable[[], Awaitable[T]], what: str) -> T:
        return await persist(
            call, what=f"{self._name}: {what}", remedy="Look at the weight store's process.", deadline_s=SILENCE_S
        )
