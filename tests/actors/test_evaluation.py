"""Held-out evaluation: exact formulas, fixed seeds, a pinned version, and judge failures left out."""

import asyncio
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from millrace.actors.config import EvaluationConfig
from millrace.actors.engines.table import TableEngine
from millrace.actors.evaluation import Evaluation, Evaluator, evaluation_seed, pass_at_k
from millrace.core.errors import ConfigError, DataError, EngineError, WeightsError
from millrace.core.protocols import Manifest, Sampling
from millrace.core.types import Ints, Prompt, Rollout, Verdict, VerdictKind, WorkerId
from millrace.core.weight_store import FileWeightStore
from millrace.core.weights import digest_of, layout

V, L = 5, 16


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"), [(1, 0, 1, 0.0), (5, 2, 1, 0.4), (4, 2, 2, 5 / 6), (6, 3, 3, 0.95), (3, 3, 2, 1.0)]
)
def test_pass_at_k_closed_forms(n: int, c: int, k: int, expected: float) -> None:
    assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 1, 2), (5, 3, 2), (6, 2, 4), (6, 0, 3), (6, 6, 1)])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_one(n: int, c: int, k: int) -> None:
    subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_is_unbiased() -> None:
    p, n, k = 0.3, 6, 3
    binomial = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    estimate = sum(weight * pass_at_k(n, c, k) for c, weight in enumerate(binomial))
    assert estimate == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(3, 1, 4), (3, 4, 1), (3, -1, 1), (3, 1, 0)])
def test_pass_at_k_refuses_numbers_that_do_not_fit(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match=f"n = {n}, c = {c}, k = {k}"):
        pass_at_k(n, c, k)


def test_more_than_the_samples_cannot_be_asked_for() -> None:
    with pytest.raises(ConfigError, match="k = 8, but k must lie between 1 and samples = 4"):
        EvaluationConfig.parse({"samples": 4, "pass_at": [1, 8]}, source="run.toml")


def test_seeds_depend_on_prompt_and_member_alone() -> None:
    seeds = [evaluation_seed(0, prompt, member) for prompt in ("a", "b") for member in range(3)]
    assert len(set(seeds)) == 6
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert evaluation_seed(1, "a", 0) != seeds[0]


PROMPTS = [Prompt(id=f"p{i}", text=f"{i}", tokens_P=np.array([i], np.int32)) for i in range(1, V)]


class World:
    """Published tables, and an evaluator on them."""

    def __init__(self, folder: Path) -> None:
        self.store = FileWeightStore(str(folder / "weights"), keep=3)
        self.model = folder / "model"
        self.model.mkdir()
        shape = {"model_type": "millrace_table", "vocab_size": V, "positions": L}
        (self.model / "config.json").write_text(json.dumps(shape))
        save_file({"table": np.zeros((V, L, V), np.float32)}, self.model / "model.safetensors")

    async def publish(self, version: int, step: int) -> None:
        table = np.random.default_rng(version).normal(size=(V, L, V)).astype(np.float32)
        buffer = table.view(np.uint8).reshape(-1)
        manifest = Manifest(
            version=version,
            step=step,
            epoch=1,
            tensors=layout([("table", "float32", table.shape)]),
            digest=digest_of(buffer),
        )
        await self.store.publish(manifest, buffer)

    def evaluator(self, judge: Any, *, engine: Any = None, prompts: Sequence[Prompt] = PROMPTS, **config: Any) -> Any:
        given = {"samples": 4, "pass_at": (1, 2, 4), "max_tokens": 3, **config}
        options = {"name": "table", "model": str(self.model), "slots": 8, "max_model_len": L}
        return Evaluator(
            WorkerId("evaluator"),
            store=self.store,
            engine=engine or options,
            prompts=prompts,
            judge=judge,
            config=EvaluationConfig.model_validate(given),
        )


def scored(score: float) -> Verdict:
    return Verdict(kind=VerdictKind.SCORED, score=score)


FAILED = Verdict(kind=VerdictKind.JUDGE_FAILED, score=None, feedback="service down")


def first_token_even(prompt: Prompt, rollouts: Sequence[Rollout]) -> list[Verdict]:
    return [scored(1.0 if rollout.tokens_T[0] % 2 == 0 else 0.0) for rollout in rollouts]


def test_the_same_version_gives_the_same_responses_and_another_gives_others(tmp_path: Path) -> None:
    async def scenario() -> list[Evaluation]:
        world = World(tmp_path)
        await world.publish(3, step=2)
        await world.publish(4, step=3)
        evaluator = world.evaluator(first_token_even)
        first = await evaluator.evaluate(3)
        other = await evaluator.evaluate(4)
        again = await world.evaluator(first_token_even, slots=1).evaluate(3)
        return [first, other, again]

    first, other, again = asyncio.run(scenario())
    assert (first.version, first.step, other.version, other.step) == (3, 2, 4, 3)
    assert first.scores == again.scores
    assert first.scores != other.scores
    assert first.tokens == 4 * 4 * 3
    assert first.length == 3.0
    assert first.prompts == 4


def test_means_and_pass_at_k_of_known_verdicts(tmp_path: Path) -> None:
    outcomes = {"p1": [1, 1, 0, 0], "p2": [0, 0, 0, 0], "p3": [1, 1, 1, 1], "p4": [0.5, 0, 1, 0]}

    async def judge(prompt: Prompt, rollouts: Sequence[Rollout]) -> list[Verdict]:
        await asyncio.sleep(0)
        return [scored(score) for score in outcomes[prompt.id]]

    async def scenario() -> Evaluation:
        world = World(tmp_path)
        await world.publish(0, step=0)
        return await world.evaluator(judge).evaluate(0)

    found = asyncio.run(scenario())
    assert found.mean == pytest.approx((0.5 + 0 + 1 + 0.375) / 4)
    assert found.pass_at_k[1] == pytest.approx((0.5 + 0 + 1 + 0.25) / 4)
    assert found.pass_at_k[2] == pytest.approx((5 / 6 + 0 + 1 + 0.5) / 4)
    assert found.pass_at_k[4] == pytest.approx(3 / 4)
    assert found.scores["p4"] == (0.5, 0, 1, 0)
    assert found.invalid == 0


def test_judge_failures_are_left_out_and_counted(tmp_path: Path) -> None:
    def judge(prompt: Prompt, rollouts: Sequence[Rollout]) -> list[Verdict]:
        if prompt.id == "p1":
            return [FAILED] * 4
        return [FAILED, FAILED, scored(1.0), scored(0.0)] if prompt.id == "p2" else [scored(1.0)] * 4

    async def scenario() -> Evaluation:
        world = World(tmp_path)
        await world.publish(0, step=0)
        return await world.evaluator(judge).evaluate(0)

    found = asyncio.run(scenario())
    assert found.invalid == 6
    assert found.causes == {"service down": 6}
    assert found.prompts == 3
    assert found.mean == pytest.approx((0.5 + 1 + 1) / 3)  # as zeros it would be (0 + 0.25 + 1 + 1) / 4
    assert found.pass_at_k[2] == 1.0
    assert found.pass_at_k[4] == 1.0  # over the two prompts that have four valid samples
    assert found.scores["p1"] == (None,) * 4


class Moving(TableEngine):
    """An engine that somebody else loads weights into."""

    async def sample(self, tokens_P: Ints, *, sampling: Sampling, seeds: Sequence[int], key: str) -> Sequence[Rollout]:
        rollouts = await super().sample(tokens_P, sampling=sampling, seeds=seeds, key=key)
        self._version += 1
        return rollouts


class Failing(TableEngine):
    """An engine that cannot sample some prompts."""

    bad: frozenset[str] = frozenset()

    async def sample(self, tokens_P: Ints, *, sampling: Sampling, seeds: Sequence[int], key: str) -> Sequence[Rollout]:
        if key in self.bad:
            raise EngineError(f"sample '{key}': the prompt is too long")
        return await super().sample(tokens_P, sampling=sampling, seeds=seeds, key=key)


def test_a_version_that_moves_during_the_evaluation_is_an_error(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path)
        await world.publish(0, step=0)
        engine = Moving(str(world.model), slots=4, max_model_len=L)
        await world.evaluator(first_token_even, engine=engine).evaluate(0)

    with pytest.raises(WeightsError, match="during the evaluation of version 0: the engine is shared"):
        asyncio.run(scenario())


def test_a_prompt_that_fails_in_the_engine_is_left_out_and_all_of_them_are_an_error(tmp_path: Path) -> None:
    async def scenario(bad: Sequence[str]) -> Evaluation:
        world = World(tmp_path / str(len(bad)))
        await world.publish(0, step=0)
        engine = Failing(str(world.model), slots=8, max_model_len=L)
        engine.bad = frozenset(bad)
        return await world.evaluator(first_token_even, engine=engine).evaluate(0)

    for folder in ("1", "4"):
        (tmp_path / folder).mkdir()
    found = asyncio.run(scenario(["p2"]))
    assert (found.prompts, found.invalid) == (3, 4)
    assert found.length == 3.0
    with pytest.raises(EngineError, match=r"none of 4 held-out prompts could be sampled at version 0.*too long"):
        asyncio.run(scenario(["p1", "p2", "p3", "p4"]))


def test_a_version_that_is_gone_is_replaced_by_the_newest_and_the_result_says_so(tmp_path: Path) -> None:
    async def scenario() -> Evaluation:
        world = World(tmp_path)
        for version in range(5):
            await world.publish(version, step=version)
        return await world.evaluator(first_token_even).evaluate(0)

    assert asyncio.run(scenario()).version == 4


def test_no_prompts_or_two_of_one_id_are_refused(tmp_path: Path) -> None:
    world = World(tmp_path)
    with pytest.raises(DataError, match="no held-out prompts"):
        world.evaluator(first_token_even, prompts=[])
    with pytest.raises(DataError, match="'p1' stands more than once"):
        world.evaluator(first_token_even, prompts=[PROMPTS[0], PROMPTS[1], PROMPTS[0]])
    with pytest.raises(ConfigError, match="the engine has no name"):
        world.evaluator(first_token_even, engine={"slots": 3})
