"""The numbers of a step, by hand."""

import numpy as np
import pytest
import torch

from millrace.core.errors import TrainingError
from millrace.learner.assemble import Sample, pack
from millrace.learner.config import OptimiserConfig
from millrace.learner.model import Policy
from millrace.learner.objective import Objective
from millrace.learner.optimiser import Optimiser
from millrace.learner.step import lag_numbers, make_step


def test_numbers_of_each_lag_by_hand():
    weight_N = np.array([1.0, 2.0, 0.5, 1.1], np.float64)
    numbers = lag_numbers(np.log(weight_N).astype(np.float32), np.array([0, 3, 3, 3]))
    assert numbers[0].tokens == 1 and numbers[0].k3 == 0
    old = weight_N[1:]
    assert numbers[3].k3 == pytest.approx((old - 1 - np.log(old)).mean())
    assert numbers[3].max_gap == pytest.approx(np.log(2))
    assert numbers[3].effective_sample_size == pytest.approx(old.sum() ** 2 / (3 * (old**2).sum()))
    assert numbers[3].clip_fraction == pytest.approx(2 / 3)


def test_gaps_of_rounding_size_have_a_k3_of_half_their_square():
    (numbers,) = lag_numbers(np.full(10, 1e-6, np.float32), np.zeros(10, np.int32)).values()
    assert numbers.k3 == pytest.approx(5e-13, rel=1e-3)


def micro_of(group: int):
    rng = np.random.default_rng(group)
    sample = Sample(
        group=group,
        prompt_P=rng.integers(61, size=3, dtype=np.int32),
        token_T=rng.integers(61, size=4, dtype=np.int32),
        behaviour_logprob_T=np.full(4, -4.0, np.float32),
        lag_T=np.zeros(4, np.int32),
        place_N=np.arange(4),
        advantage_N=np.ones(4, np.float32),
        weight_N=np.full(4, 1 / 8, np.float32),
    )
    return pack([sample])


def test_micro_batches_add_up_and_their_means_merge(make_model):
    objective = Objective.of({"advantage": "grpo", "ratio": "behaviour", "surrogate": "clip"})
    outcomes = []
    for micros in ([micro_of(0), micro_of(1)], [micro_of(1), micro_of(0)]):
        model = make_model("qwen2")
        optimiser = Optimiser(model.named_parameters(), OptimiserConfig(learning_rate=1e-3))
        outcomes.append(make_step(Policy(model), objective, optimiser, micros, name=str))
    first, second = outcomes
    assert first.loss == pytest.approx(second.loss) and first.gradient_norm == pytest.approx(second.gradient_norm)
    assert first.metrics == pytest.approx(second.metrics) and first.by_lag[0].tokens == 8
    assert first.learning_rate == 1e-3


def test_a_gradient_that_is_not_finite_is_named_by_all_groups_of_the_step(make_model):
    model = make_model("qwen2")
    before = [p.detach().clone() for p in model.parameters()]
    optimiser = Optimiser(model.named_parameters(), OptimiserConfig(learning_rate=1e-3))
    model.model.norm.weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(TrainingError, match=r"norm is nan at groups \[0, 1\]: not finite in model.norm.weight"):
        make_step(
            Policy(model),
            Objective.of({}),
            optimiser,
            [micro_of(0), micro_of(1)],
            name=lambda places: f"groups {list(places)}",
        )
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
