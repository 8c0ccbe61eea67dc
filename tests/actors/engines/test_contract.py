"""What every engine promises: exact log-probabilities, versions per token, seeds, counts, aborts, proofs."""

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from millrace.core.errors import EngineDeadError, EngineError, WeightsError
from millrace.core.protocols import Manifest, Sampling
from millrace.core.types import Ints, Rollout

PROMPT = np.array([3, 1, 4, 1, 5], np.int32)


def whole(rollout: Rollout, prompt: Ints = PROMPT) -> Ints:
    return np.concatenate([prompt, rollout.tokens_T])


def check(case: Any, rollout: Rollout, temperature: float, prompt: Ints = PROMPT) -> None:
    """Every token's log-probability is that of the version it is labelled with, on everything before it."""
    runs = rollout.versions
    assert [run.start for run in runs] == [0, *(run.end for run in runs[:-1])]
    assert runs[-1].end == len(rollout) == len(rollout.behaviour_logprob_T) == len(rollout.sampled_T)
    assert rollout.sampled_T.all()
    for version, start, end in runs:
        exact = case.logprobs(version, whole(rollout, prompt), temperature)[len(prompt) - 1 :]
        np.testing.assert_allclose(rollout.behaviour_logprob_T[start:end], exact[start:end], atol=1e-5, rtol=0)


async def until_tokens(case: Any, key: str, tokens: int) -> None:
    while case.engine.progress().get(key, 0) < tokens:
        await asyncio.sleep(0.001)


async def loaded(case: Any) -> int:
    handle = case.publish()
    proof = await case.engine.load(handle, prove=True)
    assert proof.version == case.engine.version == handle.manifest.version
    assert proof.digest == handle.manifest.digest
    assert proof.consumed == {tensor.name for tensor in handle.manifest.tensors}
    assert proof.probe_gap is not None and proof.probe_gap <= 1e-5
    return int(proof.version)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_behaviour_logprobs_are_those_of_the_sampling_distribution(case: Any, temperature: float) -> None:
    async def work() -> None:
        version = await loaded(case)
        sampling = Sampling(max_tokens=20, temperature=temperature)
        prompts = [PROMPT, PROMPT[:1], np.tile(PROMPT, 4)]
        calls = [
            case.engine.sample(prompt, sampling=sampling, seeds=range(10 * n, 10 * n + 4), key=f"call {n}")
            for n, prompt in enumerate(prompts)
        ]
        for prompt, rollouts in zip(
            [PROMPT, PROMPT[:1], np.tile(PROMPT, 4)], await asyncio.gather(*calls), strict=True
        ):
            assert [rollout.finish_reason for rollout in rollouts] == ["length"] * 4
            for rollout in rollouts:
                assert [run.version for run in rollout.versions] == [version]
                check(case, rollout, temperature, prompt)

    case.run(work)


def test_weights_change_within_running_rollouts(case: Any) -> None:
    async def work() -> None:
        first = await loaded(case)
        sampling = Sampling(max_tokens=150, temperature=0.7)
        running = asyncio.create_task(case.engine.sample(PROMPT, sampling=sampling, seeds=range(4), key="long"))
        await until_tokens(case, "long", 40)
        second = await loaded(case)
        await until_tokens(case, "long", 4 * 40 + 60)
        third = await loaded(case)
        for rollout in await running:
            assert [run.version for run in rollout.versions] == [first, second, third]
            check(case, rollout, 0.7)

    case.run(work)


def test_seeds_decide_and_nothing_else(case: Any) -> None:
    async def work() -> None:
        await loaded(case)
        sampling = Sampling(max_tokens=30)

        async def tokens(key: str, seeds: list[int]) -> list[list[int]]:
            rollouts = await case.engine.sample(PROMPT, sampling=sampling, seeds=seeds, key=key)
            assert [rollout.seed for rollout in rollouts] == seeds
            return [rollout.tokens_T.tolist() for rollout in rollouts]

        alone = [(await tokens(f"alone {seed}", [seed]))[0] for seed in (5, 6, 2**31 - 1)]
        crowd, _, _ = await asyncio.gather(
            tokens("crowd", [2**31 - 1, 6, 5]), tokens("a", [1, 2, 3]), tokens("b", list(range(20, 29)))
        )
        assert crowd == alone[::-1]
        assert len({tuple(response) for response in alone}) == 3

    case.run(work)


def test_draws_follow_the_distribution(case: Any) -> None:
    async def work() -> None:
        version = await loaded(case)
        n = 3000
        rollouts = await case.engine.sample(
            PROMPT, sampling=Sampling(max_tokens=1, temperature=1.5), seeds=range(n), key="many"
        )
        counts = np.bincount([int(rollout.tokens_T[0]) for rollout in rollouts], minlength=case.vocabulary)
        expected = n * np.exp(
            [case.logprobs(version, np.append(PROMPT, token), 1.5)[-1] for token in range(case.vocabulary)]
        )
        chi_squared = float(((counts - expected) ** 2 / expected).sum())
        freedom = case.vocabulary - 1
        assert chi_squared < freedom + 5 * np.sqrt(2 * freedom)

    case.run(work)


def test_temperature_zero_is_greedy(case: Any) -> None:
    async def work() -> None:
        version = await loaded(case)
        (rollout,) = await case.engine.sample(
            PROMPT, sampling=Sampling(max_tokens=12, temperature=0.0), seeds=[1], key="greedy"
        )
        tokens_T = whole(rollout)
        exact = case.logprobs(version, tokens_T, 1.0)[len(PROMPT) - 1 :]
        np.testing.assert_allclose(rollout.behaviour_logprob_T, exact, atol=1e-5, rtol=0)
        for end in range(len(PROMPT), len(tokens_T)):
            logprobs = [
                case.logprobs(version, np.append(tokens_T[:end], token), 1.0)[-1] for token in range(case.vocabulary)
            ]
            assert tokens_T[end] == np.argmax(logprobs)

    case.run(work)


def test_a_stop_token_ends_and_stays(case: Any) -> None:
    async def work() -> None:
        await loaded(case)
        stops = tuple(range(0, case.vocabulary, 4))
        rollouts = await case.engine.sample(
            PROMPT, sampling=Sampling(max_tokens=60, stop_token_ids=stops), seeds=range(6), key="stop"
        )
        assert [rollout.finish_reason for rollout in rollouts] == ["stop"] * 6
        for rollout in rollouts:
            assert rollout.tokens_T[-1] in stops
            assert not set(rollout.tokens_T[:-1].tolist()) & set(stops)

    case.run(work)


def test_the_counter_closes_with_aborts_and_cancellations(case: Any) -> None:
    async def work() -> None:
        await loaded(case)
        engine = case.engine
        generated, aborted = engine.generated, engine.aborted
        limits = {"abort": 200, "cancel": 200, "finish": 60}
        tasks = {
            key: asyncio.create_task(
                engine.sample(PROMPT, sampling=Sampling(max_tokens=limit), seeds=range(4), key=key)
            )
            for key, limit in limits.items()
        }
        await asyncio.gather(*(until_tokens(case, key, 40) for key in limits))
        await engine.abort("abort")
        tasks["cancel"].cancel()
        await engine.abort("never seen")
        with pytest.raises(EngineError, match=r"sample 'abort' was aborted after \d+ tokens"):
            await tasks["abort"]
        with pytest.raises(asyncio.CancelledError):
            await tasks["cancel"]
        returned = sum(len(rollout) for rollout in await tasks["finish"])
        await engine.score(PROMPT)  # scoring samples nothing
        assert returned == 240
        assert 80 <= engine.aborted - aborted < 2 * 4 * 200
        assert engine.generated - generated == returned + engine.aborted - aborted
        assert not engine.progress()

    case.run(work)


def test_scoring_beside_generation(case: Any) -> None:
    async def work() -> None:
        version = await loaded(case)
        running = asyncio.create_task(
            case.engine.sample(PROMPT, sampling=Sampling(max_tokens=80), seeds=range(4), key="beside")
        )
        await until_tokens(case, "beside", 20)
        tokens_T = np.random.default_rng(1).integers(case.vocabulary, size=200, dtype=np.int32)
        scored = await case.engine.score(tokens_T)
        np.testing.assert_allclose(scored, case.logprobs(version, tokens_T, 1.0), atol=1e-5, rtol=0)
        for rollout in await running:
            check(case, rollout, 1.0)

    case.run(work)


def test_responses_that_go_on_are_counted_while_others_of_their_call_have_ended(case: Any) -> None:
    async def work() -> None:
        await loaded(case)
        stops = tuple(range(case.vocabulary // 12))
        call = asyncio.create_task(
            case.engine.sample(
                PROMPT, sampling=Sampling(max_tokens=200, stop_token_ids=stops), seeds=range(8), key="count"
            )
        )
        await until_tokens(case, "count", 1)
        seen = [case.engine.unfinished]
        while not call.done():
            seen.append(case.engine.unfinished)
            await asyncio.sleep(0)
        assert len({len(rollout) for rollout in await call}) > 4
        assert seen == sorted(seen, reverse=True)
        assert set(seen) & {2, 3, 4, 5, 6, 7}
        assert case.engine.unfinished == 0

    case.run(work)


def test_the_slots_of_short_responses_are_filled_while_a_long_one_of_their_call_still_runs(case: Any) -> None:
    async def work() -> None:
        await loaded(case)
        few = Sampling(max_tokens=200, stop_token_ids=tuple(range(case.vocabulary // 12)))
        first = asyncio.create_task(case.engine.sample(PROMPT, sampling=few, seeds=range(16), key="first"))
        then = asyncio.create_task(
            case.engine.sample(PROMPT, sampling=Sampling(max_tokens=200), seeds=[16], key="then")
        )
        await until_tokens(case, "then", 1)
        assert not first.done()
        await asyncio.gather(first, then)

    case.run(work)


def test_more_sequences_than_slots(case: Any) -> None:
    async def work() -> None:
        await loaded(case)
        sampling = Sampling(max_tokens=9)
        calls = [case.engine.sample(PROMPT, sampling=sampling, seeds=range(8), key=f"queue {n}") for n in range(9)]
        for rollouts in await asyncio.gather(*calls):
            for rollout in rollouts:
                check(case, rollout, 1.0)

    case.run(work)


@pytest.mark.parametrize(
    ("tokens", "maximum", "message"),
    [
        (300, 10, "300 prompt tokens"),
        (250, 10, "max_model_len"),
        (0, 10, "sample 'bad': "),
    ],
)
def test_what_does_not_fit_is_refused(case: Any, tokens: int, maximum: int, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        case.run(
            lambda: case.engine.sample(
                np.ones(tokens, np.int32), sampling=Sampling(max_tokens=maximum), seeds=[1], key="bad"
            )
        )


def test_tokens_outside_the_vocabulary_are_refused(case: Any) -> None:
    with pytest.raises(EngineError, match=f"vocabulary of {case.vocabulary}"):
        case.run(
            lambda: case.engine.sample(
                np.array([case.vocabulary], np.int32), sampling=Sampling(max_tokens=2), seeds=[1], key="bad"
            )
        )


POISON = [
    (np.array([1.0, 2.0], np.float32), 2, 1, "prompt is float32 of shape"),
    (np.ones((2, 3), np.int32), 2, 1, r"of shape \(2, 3\)"),
    (np.array([3, -1], np.int32), 2, 1, "prompt tokens -1..3 are outside"),
    (np.array([2**31 - 1], np.int64), 2, 1, "outside the model's vocabulary"),
    (PROMPT, 0, 1, "max_tokens = 0"),
    (PROMPT, 2, -1, "seed -1"),
    (PROMPT, 2, 2**64, "seed 18446744073709551616"),
]


def test_poison_is_refused_beside_what_runs(case: Any) -> None:
    """No prompt may end the engine for the others."""

    async def work() -> None:
        await loaded(case)
        beside = asyncio.create_task(
            case.engine.sample(PROMPT, sampling=Sampling(max_tokens=100), seeds=range(4), key="beside")
        )
        await until_tokens(case, "beside", 4)
        for prompt, maximum, seed, message in POISON:
            with pytest.raises(EngineError, match=message) as refused:
                await case.engine.sample(prompt, sampling=Sampling(max_tokens=maximum), seeds=[1, seed], key="poison")
            assert not isinstance(refused.value, EngineDeadError)
        for rollout in await beside:
            check(case, rollout, 1.0)
        assert not case.engine.progress()

    case.run(work)


def test_keys_of_running_calls_are_unique(case: Any) -> None:
    async def work() -> None:
        sampling = Sampling(max_tokens=100)
        first = asyncio.create_task(case.engine.sample(PROMPT, sampling=sampling, seeds=[1], key="twice"))
        await until_tokens(case, "twice", 1)
        with pytest.raises(EngineError, match="'twice' is already running"):
            await case.engine.sample(PROMPT, sampling=sampling, seeds=[1], key="twice")
        await case.engine.abort("twice")
        with pytest.raises(EngineError):
            await first

    case.run(work)


def damaged(manifest: Manifest, buffer: NDArray[np.uint8]) -> Manifest:
    buffer[17] ^= 1
    return manifest


def other_probes(manifest: Manifest, buffer: NDArray[np.uint8]) -> Manifest:
    (probe,) = manifest.probes
    return replace(manifest, probes=(replace(probe, logprob_T=probe.logprob_T + np.float32(2e-5)),))


def renamed(manifest: Manifest, buffer: NDArray[np.uint8]) -> Manifest:
    first, *rest = manifest.tensors
    return replace(manifest, tensors=(replace(first, name="model.unheard_of.weight"), *rest))


def one_short(manifest: Manifest, buffer: NDArray[np.uint8]) -> Manifest:
    return replace(manifest, tensors=manifest.tensors[:-1])


def misshapen(manifest: Manifest, buffer: NDArray[np.uint8]) -> Manifest:
    first, *rest = manifest.tensors
    return replace(manifest, tensors=(replace(first, shape=(1, *first.shape)), *rest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damaged, "changed or damaged"),
        (other_probes, r"probe 0, token \d+ .* gap 2\.\d+e-05 nats, tolerance 1e-05"),
        (renamed, r"unheard_of"),
        (one_short, r"norm|no parameters|a table has one parameter, got \[\]"),
        (misshapen, r"tensor (table|model\.embed_tokens\.weight) .*shape"),
    ],
)
def test_wrong_weights_are_refused(case: Any, change: Any, message: str) -> None:
    handle = case.publish(change=change)
    with pytest.raises(WeightsError, match=message):
        case.run(lambda: case.engine.load(handle, prove=True))
    case.run(lambda: loaded(case))  # and the engine still takes right ones
