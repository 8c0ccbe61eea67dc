"""The engine of several processes, on the CPU: the same promises, and no process that outlives its owner."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from millrace.actors.engines.wiring import check_wiring
from millrace.core.errors import EngineDeadError, EngineError, WeightsError
from millrace.core.protocols import Sampling

pytestmark = [pytest.mark.ray, pytest.mark.long]

PROMPT = np.array([3, 1, 4, 1, 5], np.int32)


def check(case: Any, rollout: Any, temperature: float) -> None:
    whole = np.concatenate([PROMPT, rollout.tokens_T])
    for version, start, end in rollout.versions:
        exact = case.logprobs(version, whole, temperature)[len(PROMPT) - 1 :]
        np.testing.assert_allclose(rollout.behaviour_logprob_T[start:end], exact[start:end], atol=1e-5, rtol=0)


async def until_tokens(case: Any, key: str, tokens: int) -> None:
    while case.engine.progress().get(key, 0) < tokens:
        await asyncio.sleep(0.001)


async def in_flight_updates(case: Any) -> None:
    sampling = Sampling(max_tokens=200, temperature=0.7)
    running = asyncio.create_task(case.engine.sample(PROMPT, sampling=sampling, seeds=range(4), key="long"))
    for _ in range(2):
        await until_tokens(case, "long", sum(case.engine.progress().values()) + 80)
        proof = await case.engine.load(case.publish(), prove=True)
        assert proof.probe_gap is not None and proof.probe_gap <= 1e-5
    for rollout in await running:
        assert [run.version for run in rollout.versions] == [0, 1, 2]
        assert rollout.versions[-1].end == 200
        check(case, rollout, 0.7)


async def the_counter_closes(case: Any) -> None:
    engine = case.engine
    generated, aborted = engine.generated, engine.aborted
    limits = {"abort": 240, "cancel": 240, "finish": 60}
    tasks = {
        key: asyncio.create_task(engine.sample(PROMPT, sampling=Sampling(max_tokens=limit), seeds=range(4), key=key))
        for key, limit in limits.items()
    }
    await asyncio.gather(*(until_tokens(case, key, 40) for key in limits))
    await engine.abort("abort")
    tasks["cancel"].cancel()
    with pytest.raises(EngineError, match=r"sample 'abort' was aborted after \d+ tokens"):
        await tasks["abort"]
    with pytest.raises(asyncio.CancelledError):
        await tasks["cancel"]
    returned = sum(len(rollout) for rollout in await tasks["finish"])
    early = asyncio.create_task(engine.sample(PROMPT, sampling=Sampling(max_tokens=240), seeds=[1], key="early"))
    await asyncio.sleep(0)
    await engine.abort("early")
    with pytest.raises(EngineError, match="'early' was aborted"):
        await early
    await engine.score(PROMPT)
    await asyncio.sleep(0.3)  # what the engine process had under way arrives
    assert not engine.progress()
    assert engine.aborted - aborted >= 80
    assert engine.generated - generated == returned + engine.aborted - aborted


async def seeds_are_reproducible(case: Any) -> None:
    sampling = Sampling(max_tokens=30, stop_token_ids=(0,))

    async def tokens(key: str, seeds: list[int]) -> list[list[int]]:
        rollouts = await case.engine.sample(PROMPT, sampling=sampling, seeds=seeds, key=key)
        return [rollout.tokens_T.tolist() for rollout in rollouts]

    alone = [(await tokens(f"alone {seed}", [seed]))[0] for seed in (5, 6)]
    crowd, _ = await asyncio.gather(tokens("crowd", [6, 5]), tokens("other", [1, 2, 3]))
    assert crowd == alone[::-1]
    assert alone[0] != alone[1]


async def wrong_weights_are_refused(case: Any) -> None:
    def misshapen(manifest: Any, buffer: Any) -> Any:
        first, *rest = manifest.tensors
        return replace(manifest, tensors=(replace(first, shape=(1, *first.shape)), *rest))

    with pytest.raises(WeightsError, match="model.embed_tokens.weight"):
        await case.engine.load(case.publish(change=misshapen), prove=True)


async def poison_is_refused(case: Any) -> None:
    for prompt, maximum, message in (
        (np.ones(300, np.int32), 10, "exceed max_model_len"),
        (np.zeros(0, np.int32), 10, "the prompt is empty"),
        (np.array([case.vocabulary], np.int32), 10, "outside the model's vocabulary"),
        (PROMPT, 0, "max_tokens = 0"),
    ):
        with pytest.raises(EngineError, match=message) as refused:
            await case.engine.sample(prompt, sampling=Sampling(max_tokens=maximum), seeds=[1], key="poison")
        assert not isinstance(refused.value, EngineDeadError)


def test_the_same_promises(build_case: Callable[..., Any]) -> None:
    case = build_case("vllm_async")

    async def work() -> None:
        try:
            assert await check_wiring(case.engine, case.model, tolerance=1e-5) <= 1e-5
            await case.engine.load(case.publish(), prove=True)
            await in_flight_updates(case)
            await the_counter_closes(case)
            await seeds_are_reproducible(case)
            await wrong_weights_are_refused(case)
            await poison_is_refused(case)
        finally:
            await case.engine.close()

    case.run(work, 120)
