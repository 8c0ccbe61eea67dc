"""The same call gives the same bits, whatever else runs beside it, joins it, or is given up."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from millrace.core.errors import EngineError
from millrace.core.protocols import Sampling
from millrace.core.types import Rollout

PROMPTS = [np.random.default_rng(size).integers(1, 12, size=size, dtype=np.int32) for size in (1, 3, 9, 17)]
SAMPLING = Sampling(max_tokens=40, stop_token_ids=(0,))
MEMBERS = (1, 3, 20)  # the last is more than there are slots


def bits(rollouts: Sequence[Rollout]) -> list[tuple[bytes, bytes, str]]:
    return [(r.tokens_T.tobytes(), r.behaviour_logprob_T.tobytes(), r.finish_reason) for r in rollouts]


@pytest.mark.parametrize(("name", "options"), [("table", {}), ("transformers", {"batch_invariant": True})])
def test_bits_depend_on_the_call_alone(build_case: Callable[..., Any], name: str, options: dict[str, Any]) -> None:
    case = build_case(name, **options)

    async def sample(prompt: int, members: int, key: str) -> list[tuple[bytes, bytes, str]]:
        seeds = [100 * prompt + member for member in range(members)]
        rollouts = await case.engine.sample(PROMPTS[prompt], sampling=SAMPLING, seeds=seeds, key=key)
        for rollout in rollouts:
            whole = np.concatenate([PROMPTS[prompt], rollout.tokens_T])
            exact = case.logprobs(0, whole, 1.0)[len(PROMPTS[prompt]) - 1 :]
            np.testing.assert_allclose(rollout.behaviour_logprob_T, exact, atol=1e-5, rtol=0)
        return bits(rollouts)

    async def neighbour(number: int) -> int:
        """Tokens, if it ended before it was given up."""
        limits = Sampling(max_tokens=100)
        prompt = PROMPTS[number % len(PROMPTS)]
        try:
            rollouts = await case.engine.sample(
                prompt, sampling=limits, seeds=range(number, number + 1 + number % 4), key=f"beside {number}"
            )
        except EngineError as caught:
            assert "aborted" in str(caught)
            return 0
        return sum(len(rollout.tokens_T) for rollout in rollouts)

    async def work() -> None:
        await case.engine.load(case.publish(), prove=True)
        calls = [(prompt, members) for prompt in range(len(PROMPTS)) for members in MEMBERS]
        alone = {call: await sample(*call, key=f"alone {call}") for call in calls}
        neighbours = [asyncio.create_task(neighbour(number)) for number in range(9)]
        crowd = []
        for again in range(3):
            crowd += [(call, asyncio.create_task(sample(*call, key=f"crowd {call} {again}"))) for call in calls]
            await asyncio.sleep(0.02)
            for number in range(again, 9, 3):
                await case.engine.abort(f"beside {number}")
        for call, running in crowd:
            assert await running == alone[call], call
        whole = sum(await asyncio.gather(*neighbours))
        assert case.engine.generated == case.engine.aborted + whole + 4 * sum(
            len(tokens) // 4 for rollouts in alone.values() for tokens, _, _ in rollouts
        )

    case.run(work)
