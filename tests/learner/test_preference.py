"""learner/objectives/preference.py: values and gradients of pairs, in numpy, on ragged batches."""

from typing import Any

import numpy as np
import pytest
import torch

from millrace.core.errors import TrainingError
from millrace.learner.objective import Objective
from millrace.learner.objectives import dpo, ipo
from millrace.learner.sequences import Sequences

REFERENCE = frozenset({"reference"})


class Pairs:
    """Six groups: four pairs in either order, a tie, and a rollout alone; 1 to 6 tokens each."""

    def __init__(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        self.group_S = np.array([4, 4, 0, 0, 7, 7, 2, 2, 5, 5, 9])
        self.reward_S = np.array([1, 0, 0.25, 0.5, 0, 1, 2, -1, 0.1, 0.1, 1], np.float32)
        self.sequences = Sequences(random.integers(1, 7, 11))
        n = self.sequences.total
        self.logprob_N = torch.tensor(-random.exponential(1.0, n), requires_grad=True)
        self.reference_logprob_N = torch.tensor(-random.exponential(1.0, n))

    def have(self, objective: Objective) -> dict[str, Any]:
        weight_N = objective.token_weights(self.sequences, group_S=self.group_S)
        return {
            "logprob_N": self.logprob_N,
            "reference_logprob_N": self.reference_logprob_N,
            "reward_S": torch.from_numpy(self.reward_S),
            "group_S": self.group_S,
            "sequences": self.sequences,
            "weight_N": torch.tensor(weight_N, dtype=torch.float64),
        }

    def pairs(self) -> list[tuple[int, int]]:
        """Better and worse: places among the sequences."""
        return [(0, 1), (3, 2), (5, 4), (6, 7)]

    def margins(self) -> list[float]:
        h_N = (self.logprob_N - self.reference_logprob_N).detach().numpy()
        h_S = np.add.reduceat(h_N, np.cumsum(self.sequences.lengths_S) - self.sequences.lengths_S)
        return [h_S[better] - h_S[worse] for better, worse in self.pairs()]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", ["dpo", "ipo"])
def test_mean_over_pairs_and_its_gradient(name: str, seed: int) -> None:
    batch, beta = Pairs(seed), 0.3
    objective = Objective.of(
        {"name": name, "beta": beta, "selection": "best_and_worst", "aggregation": "sequence_mean"}, models=REFERENCE
    )
    loss = objective(batch.have(objective)).value
    (gradient,) = torch.autograd.grad(loss, batch.logprob_N)

    margin = np.array(batch.margins())
    if name == "dpo":
        each, slope = np.log1p(np.exp(-beta * margin)), -beta / (1 + np.exp(beta * margin))
    else:
        each, slope = (margin - 0.5 / beta) ** 2, 2 * (margin - 0.5 / beta)
    slope_S = np.zeros(11)
    for (better, worse), d in zip(batch.pairs(), slope, strict=True):
        slope_S[better], slope_S[worse] = d, -d
    # 11 sequences weigh the same; a pair's loss stands on two of them, so that each pair weighs 2 / 11
    lengths = batch.sequences.lengths_S
    np.testing.assert_allclose(float(loss.detach()), 2 / 11 * each.sum(), rtol=1e-6)
    np.testing.assert_allclose(gradient.numpy(), 2 / 11 * np.repeat(slope_S, lengths), rtol=1e-6, atol=1e-12)


def test_of_whole_pairs_alone_it_is_the_mean_over_them() -> None:
    batch = Pairs(0)
    objective = Objective.of({"name": "dpo", "aggregation": "sequence_mean"}, models=REFERENCE)
    cut, tokens = slice(0, 8), batch.sequences.tokens(slice(0, 8))
    weight_N = objective.token_weights(batch.sequences[cut], group_S=batch.group_S[cut])
    have = {
        "logprob_N": batch.logprob_N[tokens],
        "reference_logprob_N": batch.reference_logprob_N[tokens],
        "reward_S": torch.from_numpy(batch.reward_S[cut]),
        "group_S": batch.group_S[cut],
        "sequences": batch.sequences[cut],
        "weight_N": torch.tensor(weight_N, dtype=torch.float64),
    }
    expected = np.mean(np.log1p(np.exp(-0.1 * np.array(batch.margins()))))
    np.testing.assert_allclose(float(objective(have).value.detach()), expected, rtol=1e-6)


def test_by_hand() -> None:
    # h: (-1 + 1) + (-1 + 2) = 1 of the better, -3 + 2 = -1 of the worse; log(1 + exp(-0.5 * 2)) = 0.31326169
    logprob_N, reference_N = torch.tensor([-1.0, -1.0, -3.0]), torch.tensor([-1.0, -2.0, -2.0])
    pair = (torch.tensor([0.7, 0.2]), np.array([3, 3]), Sequences([2, 1]))
    np.testing.assert_allclose(dpo(logprob_N, reference_N, *pair, beta=0.5).numpy(), [0.31326169] * 3, rtol=1e-6)
    # (2 - 1 / (2 * 0.2))^2 = 0.25
    np.testing.assert_allclose(ipo(logprob_N, reference_N, *pair, beta=0.2).numpy(), [0.25] * 3, rtol=1e-6)
    # at the reference itself every pair costs log 2
    np.testing.assert_allclose(dpo(reference_N, reference_N, *pair).numpy(), [0.69314718] * 3, rtol=1e-6)


def test_rewards_one_rounding_apart_are_a_pair() -> None:
    low = np.float32(0.1)
    reward_S = torch.tensor([low, np.nextafter(low, np.float32(1))])
    loss = dpo(torch.tensor([-1.0, -1.0]), torch.tensor([-2.0, -1.0]), reward_S, np.array([0, 0]), Sequences([1, 1]))
    np.testing.assert_allclose(loss.numpy(), [np.log1p(np.exp(0.1))] * 2, rtol=1e-6)


def test_three_rollouts_are_no_pair() -> None:
    objective = Objective.of({"name": "dpo"}, models=REFERENCE)
    zero_N = torch.zeros(3)
    have = {
        "logprob_N": zero_N,
        "reference_logprob_N": zero_N,
        "reward_S": zero_N,
        "group_S": np.zeros(3, np.int64),
        "sequences": Sequences([1, 1, 1]),
        "weight_N": zero_N,
    }
    with pytest.raises(TrainingError, match=r'one group brought 3: add selection = "best_and_worst"'):
        objective(have)


def test_no_sequences_are_no_loss() -> None:
    none = torch.zeros(0)
    assert dpo(none, none, none, np.zeros(0, np.int64), Sequences([])).shape == (0,)
