"""Held-out evaluation as a component, beside the loop and outside its ledger.

consumes       the weights of every k-th step, which the store holds for it
waits for      the next of them
unblocked by   publish
"""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from millrace.actors.config import EvaluationConfig
from millrace.actors.evaluation import Evaluation, Evaluator
from millrace.core.types import Prompt, WorkerId
from millrace.core.weight_store import NodeStore
from millrace.rewards.worker import DeferredJudge

POLL_S = 0.5


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
        self._store = store
        self._evaluator = Evaluator(name, store=store, engine=engine, prompts=prompts, judge=judge, config=config)
        self._done: list[Evaluation] = []
        self._finishing = asyncio.Event()

    async def run(self) -> None:
        """Evaluate until `finish` was called and nothing is held any more.

        Raises:
            WeightsError: the engine does not hold what was published.
            EngineError: no prompt at all could be sampled.
            RewardError: the verifier fails again and again.
        """
        while True:
            finishing = self._finishing.is_set()
            held = await self._store.held()
            for version in held:
                self._done.append(await self._evaluator.evaluate(version))
                await self._store.release(version)
            if held:
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
        """All evaluations but the first `after`."""
        return self._done[after:]

    async def close(self) -> None:
        await self._evaluator.close()
