"""learner/corrections/: each weight by hand, its formula written out in numpy, and what holds for all of them."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from millrace.core import catalogue, words
from millrace.learner.corrections import (
    age_decay,
    geometric_mask,
    icepop,
    off_policy_mask,
    sequence_masked_importance,
    sequence_truncated_importance,
    tapered_importance,
    truncated_importance,
)
from millrace.learner.objective import Objective
from millrace.learner.sequences import Sequences

FOLDER = "millrace.learner.corrections"
NAMES = catalogue.names(FOLDER)
# Probabilities now and when sampled: token ratios 2, 1/2, 4 | 1/5 | 1, 3
NEW = torch.tensor([0.5, 0.2, 0.8, 0.1, 0.3, 0.9]).log()
OLD = torch.tensor([0.25, 0.4, 0.2, 0.5, 0.3, 0.3]).log()
RATIO = np.array([2, 0.5, 4, 0.2, 1, 3])
SEQUENCES = Sequences([3, 1, 2])
PRODUCT = np.array([4, 4, 4, 0.2, 3, 3])  # 2 * 1/2 * 4, 1/5, 1 * 3
ADVANTAGE = torch.tensor([1.0, 1.0, 1.0, -1.0, -2.0, -2.0])


def close(got: torch.Tensor, expected: Any) -> None:
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_truncated_importance() -> None:
    close(truncated_importance(NEW, OLD, cap=1.5), np.minimum(RATIO, 1.5))
    huge = truncated_importance(torch.tensor([0.0]), torch.tensor([-500.0]), cap=2.0)
    close(huge, [2.0])  # exp(500) overflows; the cap does not


def test_icepop() -> None:
    close(icepop(NEW, OLD, low=0.4, high=2.0), [2, 0.5, 0, 0, 1, 0])
    # without its lower bound it is the masked importance sampling of tokens
    close(icepop(NEW, OLD, low=0.0, high=2.0), np.where(RATIO <= 2, RATIO, 0))


def test_sequence_truncated_importance() -> None:
    close(sequence_truncated_importance(NEW, OLD, SEQUENCES, cap=3.5), np.minimum(PRODUCT, 3.5))


def test_sequence_masked_importance() -> None:
    close(sequence_masked_importance(NEW, OLD, SEQUENCES, low=0.5, high=3.5), [0, 0, 0, 0, 3, 3])
    close(sequence_masked_importance(NEW, OLD, SEQUENCES, high=3.5), [0, 0, 0, 0.2, 3, 3])


def test_the_product_of_a_long_sequence_stays_finite() -> None:
    """A thousand tokens, each e times likelier: e^1000."""
    new, old, one = torch.zeros(1000), torch.full((1000,), -1.0), Sequences([1000])
    close(sequence_truncated_importance(new, old, one, cap=2.0), np.full(1000, 2.0))
    close(sequence_masked_importance(new, old, one, high=2.0), np.zeros(1000))
    close(sequence_truncated_importance(old, new, one, cap=2.0), np.zeros(1000))
    close(tapered_importance(new, old, torch.full((1000,), -1.0), one), np.ones(1000))


def test_geometric_mask_takes_no_account_of_the_length() -> None:
    # geometric means: 4^(1/3) = 1.587, 1/5, 3^(1/2) = 1.732
    close(geometric_mask(NEW, OLD, SEQUENCES, low=0.5, high=1.6), [1, 1, 1, 0, 0, 0])
    close(geometric_mask(NEW, OLD, SEQUENCES, low=0.1, high=1.6), [1, 1, 1, 1, 0, 0])
    per_token = torch.full((100,), math.log(1.005))
    for length in (1, 100):
        kept = geometric_mask(per_token[:length], torch.zeros(length), Sequences([length]))
        close(kept, np.ones(length))


def test_off_policy_mask_drops_what_failed_and_became_unlikely() -> None:
    # mean of log(mu / pi): -0.46, log 5 = 1.61, -0.55; of negative advantage are the second and the third
    close(off_policy_mask(NEW, OLD, ADVANTAGE, SEQUENCES, threshold=0.5), [1, 1, 1, 0, 1, 1])
    close(off_policy_mask(NEW, OLD, ADVANTAGE, SEQUENCES, threshold=1.7), np.ones(6))
    # the other direction: what became likelier stays, and so does what succeeded, however unlikely
    close(off_policy_mask(OLD, NEW, ADVANTAGE, SEQUENCES, threshold=0.5), [1, 1, 1, 1, 0, 0])


def test_tapered_importance() -> None:
    # A >= 0: 1; A < 0: min(product, 1)
    close(tapered_importance(NEW, OLD, ADVANTAGE, SEQUENCES), [1, 1, 1, 0.2, 1, 1])
    close(tapered_importance(NEW, OLD, -ADVANTAGE, SEQUENCES), np.ones(6))
    close(tapered_importance(OLD, NEW, -ADVANTAGE, SEQUENCES), [0.25, 0.25, 0.25, 1, 1, 1])  # products 1/4, 5, 1/3
    close(tapered_importance(OLD, NEW, torch.zeros(6), SEQUENCES), np.ones(6))


def test_age_decay() -> None:
    staleness_N = torch.tensor([0, 1, 3, 8])
    close(age_decay(staleness_N, power=0.5), [1, 2**-0.5, 0.5, 1 / 3])
    close(age_decay(staleness_N, power=1.0), [1, 1 / 2, 1 / 4, 1 / 9])
    close(age_decay(staleness_N, power=0.0), np.ones(4))


def call(name: str, **change: torch.Tensor) -> torch.Tensor:
    have = {
        "logprob_N": NEW,
        "proximal_logprob_N": NEW,
        "behaviour_logprob_N": OLD,
        "advantage_N": ADVANTAGE,
        "staleness_N": torch.zeros(6, dtype=torch.int64),
        "sequences": SEQUENCES,
    }
    method = catalogue.resolve(name, folder=FOLDER, words=words.SLOTS["correction"], slot="correction")
    weight_N: torch.Tensor = method.call({**have, **change})
    return weight_N


@pytest.mark.parametrize("name", NAMES)
def test_on_policy_every_weight_is_1_and_none_carries_a_gradient(name: str) -> None:
    x = NEW.clone().requires_grad_()
    assert not call(name, logprob_N=x, proximal_logprob_N=x).requires_grad
    close(call(name, logprob_N=OLD, proximal_logprob_N=OLD), np.ones(6))


@pytest.mark.parametrize("name", NAMES)
def test_a_sequence_does_not_see_the_others(name: str) -> None:
    before = call(name)
    other = torch.cat([NEW[:3] - 1.0, NEW[3:]])
    after = call(name, logprob_N=other, proximal_logprob_N=other)
    torch.testing.assert_close(before[3:], after[3:])


def test_topr_has_the_gradient_of_the_paper() -> None:
    """Sum of the successes' score functions, and of the failures' under their ratio clipped to [0, 1]; over S."""
    objective = Objective.of(
        {
            "advantage": "reward",
            "surrogate": "reinforce",
            "corrections": "tapered_importance",
            "aggregation": "sequence_sum",
        }
    )
    x = OLD.clone().requires_grad_()  # what was sampled under NEW is learnt from under OLD: products 1/4, 5, 1/3
    advantage_N = torch.tensor([-2.0, -2.0, -2.0, 1.0, -3.0, -3.0])
    weight_N = torch.from_numpy(objective.token_weights(SEQUENCES, group_S=np.arange(3)))
    have = {
        "logprob_N": x,
        "behaviour_logprob_N": NEW,
        "advantage_N": advantage_N,
        "weight_N": weight_N,
        "sequences": SEQUENCES,
    }
    loss = objective(have).value
    (gradient,) = torch.autograd.grad(loss, x)
    alpha = np.array([0.25, 0.25, 0.25, 1, 1 / 3, 1 / 3])
    np.testing.assert_allclose(gradient.numpy(), -alpha * advantage_N.numpy() / 3, rtol=1e-5)
    np.testing.assert_allclose(float(loss.detach()), (-alpha * advantage_N.numpy() * OLD.numpy()).sum() / 3, rtol=1e-5)
