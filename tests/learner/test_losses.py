"""Ratios, surrogates, penalties and objectives: closed-form value AND gradient of each.

`slope(f, x)` is the gradient of sum(f(x)); the formula stands beside each expected number.
"""

import math
from collections.abc import Callable

import pytest
import torch

from millrace.core import catalogue
from millrace.learner.aggregations import sequence_mean
from millrace.learner.objectives import nll
from millrace.learner.penalties import entropy, k1, k2, k3, k3_unbiased
from millrace.learner.ratios import behaviour, behaviour_sequence, sequence, sequence_product, token
from millrace.learner.sequences import Sequences
from millrace.learner.surrogates import cispo, clip, policy_gradient, reinforce

LOG = torch.tensor([0.5, 0.2, 0.9, 0.1]).log()  # the policy's probabilities
OLD = torch.tensor([0.25, 0.4, 0.9, 0.5]).log()  # an earlier policy's: ratios 2, 1/2, 1, 1/5
RATIO = torch.tensor([2.0, 0.5, 1.0, 0.2])


def slope(f: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(f(x).sum(), x)
    return gradient


def close(got: torch.Tensor, expected: list[float] | torch.Tensor) -> None:
    torch.testing.assert_close(got, torch.as_tensor(expected), rtol=1e-6, atol=1e-6)


# Ratios


@pytest.mark.parametrize("ratio", [token, behaviour])
def test_token_ratios(ratio: Callable[..., torch.Tensor]) -> None:
    close(ratio(LOG, OLD), RATIO)
    close(slope(lambda x: ratio(x, OLD), LOG), RATIO)  # d exp(x - old) / dx = the ratio


@pytest.mark.parametrize("ratio", [sequence, behaviour_sequence])
def test_sequence_ratios(ratio: Callable[..., torch.Tensor]) -> None:
    sequences = Sequences([3, 1])
    # geometric means: (2 * 1/2 * 1)^(1/3) = 1, and 1/5; d ratio_t / d logprob_t = s
    close(ratio(LOG, OLD, sequences), [1.0, 1.0, 1.0, 0.2])
    close(slope(lambda x: ratio(x, OLD, sequences), LOG), [1.0, 1.0, 1.0, 0.2])
    # (2 * 1/2 * 1 * 1/5)^(1/4) = 0.66874030
    close(ratio(LOG, OLD, Sequences([4])), [0.66874030] * 4)


def test_sequence_ratio_has_the_gradient_of_s_under_sequence_mean() -> None:
    """GSPO's own objective, mean_S(s * A), differentiated directly, against its token form."""
    sequences, advantage_S = Sequences([3, 1]), torch.tensor([1.5, -2.0])
    weight_N = torch.from_numpy(sequence_mean(sequences))

    def direct(x: torch.Tensor) -> torch.Tensor:
        return torch.exp(sequences.mean(x - OLD)) * advantage_S / 2

    def by_token(x: torch.Tensor) -> torch.Tensor:
        return weight_N * sequence(x, OLD, sequences) * sequences.spread(advantage_S)

    close(by_token(LOG).sum(), direct(LOG).sum())
    close(slope(by_token, LOG), slope(direct, LOG))


def test_the_product_of_a_long_sequence_stays_finite() -> None:
    log_N = torch.full((200,), -0.1, requires_grad=True)
    ratio_N = sequence_product(log_N, torch.full((200,), -1.0), Sequences([200]))
    ratio_N.sum().backward()
    assert torch.isfinite(ratio_N).all() and log_N.grad is not None and torch.isfinite(log_N.grad).all()


def test_sequence_product() -> None:
    sequences = Sequences([3, 1])
    # 2 * 1/2 * 1 = 1, and 1/5; the sum over a sequence of its T ratios has gradient T * ratio at each of its tokens
    close(sequence_product(LOG, OLD, sequences), [1.0, 1.0, 1.0, 0.2])
    close(slope(lambda x: sequence_product(x, OLD, sequences), LOG), [3.0, 3.0, 3.0, 0.2])
    close(sequence_product(LOG[2:], OLD[2:], Sequences([2])), [0.2, 0.2])


def test_sequence_product_under_sequence_mean_is_the_loss_of_the_sequence_as_one_action() -> None:
    sequences, advantage_S = Sequences([3, 1]), torch.tensor([1.5, -2.0])
    weight_N = torch.from_numpy(sequence_mean(sequences))

    def by_token(x: torch.Tensor) -> torch.Tensor:
        return weight_N * clip(sequence_product(x, OLD, sequences), sequences.spread(advantage_S), low=0.9, high=0.9)

    # mean over both of -s * A: -(1 * 1.5 + 0.2 * -2) / 2 = -0.55, gradient -s * A / 2 on each token
    close(by_token(LOG).sum(), torch.tensor(-0.55))
    close(slope(by_token, LOG), [-0.75, -0.75, -0.75, 0.2])


# Surrogates


def test_policy_gradient() -> None:
    advantage_N = torch.tensor([1.0, -2.0, 3.0, 0.0])
    close(policy_gradient(RATIO, advantage_N), [-2.0, 1.0, -3.0, 0.0])  # -ratio * A
    close(slope(lambda x: policy_gradient(x, advantage_N), RATIO), -advantage_N)


def test_reinforce() -> None:
    advantage_N = torch.tensor([1.0, -2.0, 3.0, 0.0])
    close(reinforce(LOG, advantage_N), -advantage_N * LOG)
    close(slope(lambda x: reinforce(x, advantage_N), LOG), -advantage_N)


# ratio, A -> loss, d loss / d ratio for low = 0.2, high = 0.3; the range is [0.8, 1.3]
CLIPPED = [
    (1.1, 2.0, -2.2, -2.0),  # inside: -ratio * A
    (1.5, 2.0, -2.6, 0.0),  # above, A > 0: -1.3 * A, no gradient
    (0.5, 2.0, -1.0, -2.0),  # below, A > 0: moved the wrong way, -ratio * A
    (0.5, -2.0, 1.6, 0.0),  # below, A < 0: 0.8 * |A|, no gradient
    (1.5, -2.0, 3.0, 2.0),  # above, A < 0: moved the wrong way, ratio * |A|
    (9.0, -2.0, 18.0, 2.0),  # far above, A < 0: no bound without dual
    (1.5, 0.0, 0.0, 0.0),
]


@pytest.mark.parametrize(("ratio", "advantage", "loss", "gradient"), CLIPPED)
def test_clip(ratio: float, advantage: float, loss: float, gradient: float) -> None:
    ratio_N, advantage_N = torch.tensor([ratio]), torch.tensor([advantage])
    close(clip(ratio_N, advantage_N, low=0.2, high=0.3), [loss])
    close(slope(lambda x: clip(x, advantage_N, low=0.2, high=0.3), ratio_N), [gradient])


def test_dual_clip_bounds_a_negative_advantage_only() -> None:
    ratio_N, advantage_N = torch.tensor([9.0, 2.0, 9.0]), torch.tensor([-2.0, -2.0, 2.0])
    # beyond 3, A < 0: -A * 3 = 6, no gradient; within: ratio * |A| = 4; A > 0: clipped at 1.2: -2.4
    close(clip(ratio_N, advantage_N, dual=3.0), [6.0, 4.0, -2.4])
    close(slope(lambda x: clip(x, advantage_N, dual=3.0), ratio_N), [0.0, 2.0, 0.0])


def test_clip_at_ratio_1_has_the_policy_gradient() -> None:
    """The first optimiser step of a batch: the value lies on the tie between both branches."""
    advantage_N = torch.tensor([1.0, -2.0, 3.0, 0.0])
    for dual in (None, 3.0):
        gradient = slope(lambda x, dual=dual: clip(token(x, LOG), advantage_N, dual=dual), LOG)  # type: ignore[misc]
        close(gradient, -advantage_N)
    close(slope(lambda x: reinforce(x, advantage_N), LOG), -advantage_N)


def test_cispo() -> None:
    logprob_N = torch.tensor([-1.0, -2.0, -0.5, -3.0])
    ratio_N = torch.tensor([9.0, 0.5, 1.0, 0.1])
    advantage_N = torch.tensor([1.0, -1.0, 2.0, 3.0])
    # weights min(ratio, 1 + 2): 3, 0.5, 1, 0.1; loss -weight * A * logprob
    close(cispo(ratio_N, logprob_N, advantage_N, high=2.0), [3.0, -1.0, 1.0, 0.9])
    # every token keeps a gradient -weight * A, also the one beyond the bound; with low = 0.2 the last weight is 0.8
    close(slope(lambda x: cispo(ratio_N, x, advantage_N, high=2.0), logprob_N), [-3.0, 0.5, -2.0, -0.3])
    close(slope(lambda x: cispo(ratio_N, x, advantage_N, low=0.2, high=2.0), logprob_N), [-3.0, 0.8, -2.0, -2.4])


def test_cispo_differentiates_log_probabilities_only() -> None:
    ratio_N = RATIO.clone().requires_grad_()
    assert not cispo(ratio_N, LOG, torch.ones(4)).requires_grad
    ratio = token(x := LOG.clone().requires_grad_(), OLD)
    (gradient,) = torch.autograd.grad(cispo(ratio, x, torch.ones(4)).sum(), x)
    close(gradient, -RATIO)  # -sg[ratio] * A, without the term through the ratio


@pytest.mark.parametrize("name", catalogue.names("millrace.learner.surrogates"))
def test_zero_advantage_gives_zero_loss_and_zero_gradient(name: str) -> None:
    """What `Objective.zero_advantage_is_zero_loss` says of the whole catalogue."""
    x = LOG.clone().requires_grad_()
    method = catalogue.resolve(
        name, folder="millrace.learner.surrogates", words=("ratio_N", "logprob_N", "advantage_N"), slot="surrogate"
    )
    loss_N = method.call({"ratio_N": token(x, OLD), "logprob_N": x, "advantage_N": torch.zeros(4)})
    (gradient,) = torch.autograd.grad(loss_N.sum(), x)
    assert not loss_N.any() and not gradient.any()


# Penalties


def test_k1() -> None:
    close(k1(LOG, OLD, coefficient=0.5), 0.5 * RATIO.log())  # c * log(pi / ref)
    close(slope(lambda x: k1(x, OLD, coefficient=0.5), LOG), [0.5] * 4)  # c


def test_k2() -> None:
    close(k2(LOG, OLD, coefficient=0.5), 0.25 * RATIO.log() ** 2)  # c / 2 * log(pi / ref)^2
    close(slope(lambda x: k2(x, OLD, coefficient=0.5), LOG), 0.5 * RATIO.log())  # c * log(pi / ref)


def test_k3() -> None:
    # q = ref / pi = 1/2, 2, 1, 5: q - log q - 1 = 0.19314718, 0.30685282, 0, 2.39056209
    close(k3(LOG, OLD, coefficient=1.0), [0.19314718, 0.30685282, 0.0, 2.39056209])
    close(slope(lambda x: k3(x, OLD, coefficient=2.0), LOG), [1.0, -2.0, 0.0, -8.0])  # c * (1 - q)


def test_k3_is_exact_near_zero() -> None:
    """q - log q - 1 of q = exp(1e-4) is 5.0e-9; in float32, exp(1e-4) - 1e-4 - 1 would keep no digit of it."""
    assert float(k3(torch.tensor(0.0), torch.tensor(1e-4), coefficient=1e9)) == pytest.approx(5.0, rel=1e-3)


def test_k3_unbiased() -> None:
    mu = torch.tensor([0.25, 0.2, 0.45, 0.2]).log()  # weights 2, 1, 2, 1/2; q as in test_k3
    expected = [2 * 0.19314718, 0.30685282, 0.0, 0.5 * 2.39056209]  # w * (q - log q - 1)
    close(k3_unbiased(LOG, OLD, mu, coefficient=1.0), expected)
    # c * w * log(pi / ref), log(pi / ref) = log 2, -log 2, 0, -log 5
    gradient = [4 * math.log(2), -2 * math.log(2), 0.0, -math.log(5)]
    close(slope(lambda x: k3_unbiased(x, OLD, mu, coefficient=2.0), LOG), gradient)


def test_k3_unbiased_descends_the_reverse_divergence_whoever_sampled() -> None:
    """Expectation over a whole vocabulary under a sampler that is neither the policy nor the reference."""
    logits = torch.tensor([0.3, -1.0, 0.7], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-0.2, 0.4, 0.1], dtype=torch.float64).log_softmax(0)
    sampler = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64).log_softmax(0)
    expected = (sampler.exp() * k3_unbiased(logits.log_softmax(0), reference, sampler, coefficient=1.0)).sum()
    logprob = logits.log_softmax(0)
    divergence = (logprob.exp() * (logprob - reference)).sum()
    torch.testing.assert_close(expected, divergence)
    (got,), (gradient,) = torch.autograd.grad(expected, logits), torch.autograd.grad(divergence, logits)
    torch.testing.assert_close(got, gradient, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [(k1, "nothing"), (k2, "reverse"), (k3, "forward")],
)
def test_which_divergence_each_estimator_descends(estimator: Callable[..., torch.Tensor], expected: str) -> None:
    """Expectation over a whole vocabulary, the sampling itself not differentiated: what on-policy training sees."""
    logits = torch.tensor([0.3, -1.0, 0.7], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-0.2, 0.4, 0.1], dtype=torch.float64).log_softmax(0)
    logprob = logits.log_softmax(0)
    (got,) = torch.autograd.grad(
        (logprob.exp().detach() * estimator(logprob, reference, coefficient=1.0)).sum(), logits
    )
    logprob = logits.log_softmax(0)
    divergence = {
        "nothing": logprob.sum() * 0,
        "reverse": (logprob.exp() * (logprob - reference)).sum(),
        "forward": (reference.exp() * (reference - logprob)).sum(),
    }[expected]
    (gradient,) = torch.autograd.grad(divergence, logits)
    torch.testing.assert_close(got, gradient, atol=1e-12, rtol=0)


@pytest.mark.parametrize("estimator", [k1, k3])
def test_unbiased_estimators_have_the_divergence_as_their_mean(estimator: Callable[..., torch.Tensor]) -> None:
    logprob, reference = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.2, 0.3, 0.5]).log()
    mean = (logprob.exp() * estimator(logprob, reference, coefficient=1.0)).sum()
    assert float(mean) == pytest.approx(0.3 * math.log(2.5), rel=1e-5)  # 0.5 log(0.5/0.2) + 0.2 log(0.2/0.5)


def test_entropy_bonus() -> None:
    entropy_N = torch.tensor([2.0, 0.5])
    close(entropy(entropy_N, coefficient=0.1), [-0.2, -0.05])
    close(slope(lambda x: entropy(x, coefficient=0.1), entropy_N), [-0.1, -0.1])


# Objectives


def test_nll() -> None:
    close(nll(LOG), -LOG)
    close(slope(nll, LOG), [-1.0] * 4)
