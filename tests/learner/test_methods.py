"""Every recipe as it stands: loss and gradient on ragged random batches, against its formulas written out in numpy.

Each method below is a function of the batch that returns the loss and its gradient by the log-probabilities; nothing
of ours is called in it. `ours` composes the same of the recipe's file.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from millrace.core import recipe
from millrace.learner.objective import Objective
from millrace.learner.sequences import Sequences
from millrace.rewards.shaping import Shaping

Array = NDArray[np.float64]
Answer = tuple[float, Array]
GROUPS, SIZE, LONGEST = 4, 5, 8


class Batch:
    """4 groups of 5 sequences of 1 to 8 tokens; the first group's rewards are equal."""

    def __init__(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        self.lengths = random.integers(1, LONGEST + 1, GROUPS * SIZE)
        n = int(self.lengths.sum())
        self.reward = random.integers(0, 3, GROUPS * SIZE) / 2
        self.reward[:SIZE] = 0.5
        self.group = np.repeat(np.arange(GROUPS), SIZE)
        self.new = -random.exponential(1.0, n)
        self.old = self.new + 0.2 * random.normal(size=n)
        self.mu = self.new + 0.4 * random.normal(size=n)
        self.ref = self.new + 0.5 * random.normal(size=n)
        self.entropy = random.exponential(1.0, n)
        self.age = random.integers(0, 4, n)

    def spread(self, x: Array) -> Array:
        return np.repeat(x, self.lengths)

    def sums(self, x: Array) -> Array:
        return np.add.reduceat(x, np.cumsum(self.lengths) - self.lengths)

    def means(self, x: Array) -> Array:
        return self.sums(x) / self.lengths

    # What weighs the same

    @property
    def by_token(self) -> Array:
        return np.full(len(self.new), 1 / len(self.new))

    @property
    def by_sequence(self) -> Array:
        return self.spread(1 / (len(self.lengths) * self.lengths))

    @property
    def by_answer(self) -> Array:
        return np.full(len(self.new), 1 / len(self.lengths))

    @property
    def by_prompt(self) -> Array:
        tokens = self.lengths.reshape(GROUPS, SIZE).sum(1)
        return self.spread(1 / (GROUPS * tokens[self.group]))

    # Advantages, of each token

    def centred(self, reward: Array | None = None) -> Array:
        grouped = (self.reward if reward is None else reward).reshape(GROUPS, SIZE)
        return (grouped - grouped.mean(1, keepdims=True)).ravel()

    def grpo(self, reward: Array | None = None) -> Array:
        grouped = (self.reward if reward is None else reward).reshape(GROUPS, SIZE)
        return self.spread(self.centred(reward) / np.repeat(grouped.std(1, ddof=1) + 1e-6, SIZE))

    def whitened(self) -> Array:
        return whiten(self.spread(self.centred()))


def whiten(advantage: Array) -> Array:
    return (advantage - advantage.mean()) / np.sqrt(advantage.var() + 1e-8)


def clip(ratio: Array, A: Array, low: float = 0.2, high: float = 0.2, dual: float = np.inf) -> tuple[Array, Array]:
    """Loss, and its slope by the log-probability where d ratio = ratio."""
    free = np.where(A >= 0, ratio <= 1 + high, (ratio >= 1 - low) & (ratio <= dual))
    bounded = np.where(A >= 0, 1 + high, np.where(ratio > dual, dual, 1 - low))
    return -A * np.where(free, ratio, bounded), -A * ratio * free


def tis(b: Batch, cap: float = 2.0, old: Array | None = None) -> Array:
    return np.minimum(np.exp((b.old if old is None else old) - b.mu), cap)


def total(weight: Array, loss: Array, slope: Array) -> Answer:
    return float((weight * loss).sum()), weight * slope


def clipped(b: Batch, A: Array, weight: Array, correction: Array, **settings: float) -> Answer:
    loss, slope = clip(np.exp(b.new - b.old), A, **settings)
    return total(weight, correction * loss, correction * slope)


def plus(answer: Answer, weight: Array, loss: Array, slope: Array | float) -> Answer:
    more = total(weight, loss, np.broadcast_to(slope, loss.shape))
    return answer[0] + more[0], answer[1] + more[1]


def k3(b: Batch) -> tuple[Array, Array]:
    q = np.exp(b.ref - b.new)
    return q - np.log(q) - 1, 1 - q


def with_k3(b: Batch, answer: Answer, weight: Array, coefficient: float) -> Answer:
    value, slope = k3(b)
    return plus(answer, weight, coefficient * value, coefficient * slope)


def a3po(b: Batch) -> Answer:
    alpha = 1 / np.maximum(b.age, 1)
    old = alpha * b.mu + (1 - alpha) * b.new
    loss, slope = clip(np.exp(b.new - old), b.whitened())
    return total(b.by_token, tis(b, 5.0, old) * loss, tis(b, 5.0, old) * slope)


def cispo(b: Batch) -> Answer:
    weight = np.minimum(np.exp(b.new - b.mu), 5.0)
    return total(b.by_prompt, -weight * b.grpo() * b.new, -weight * b.grpo())


def dapo(b: Batch) -> Answer:
    reward = b.reward - np.clip((b.lengths - 0.8 * LONGEST) / (0.2 * LONGEST), 0, 1)
    return clipped(b, b.grpo(reward), b.by_token, tis(b), high=0.28)


def dpo(b: Batch) -> Answer:
    h, loss, slope_S = b.sums(b.new - b.ref), 0.0, np.zeros(len(b.lengths))
    for group in range(1, GROUPS):  # the first is a tie
        rewards = b.reward[b.group == group]
        best, worst = group * SIZE + rewards.argmax(), group * SIZE + rewards.argmin()
        margin = 0.1 * (h[best] - h[worst])
        loss += np.log1p(np.exp(-margin)) / (GROUPS - 1)
        slope_S[best] = -0.1 / (1 + np.exp(margin)) / (GROUPS - 1)
        slope_S[worst] = -slope_S[best]
    return loss, b.spread(slope_S)


def grpo_kl_reward(b: Batch) -> Answer:
    reward = b.reward - 0.02 * b.sums(b.old - b.ref)
    return clipped(b, b.spread(b.centred(reward)), b.by_sequence, tis(b))


def grpo_kl_unbiased(b: Batch) -> Answer:
    A, ratio = b.spread(b.centred()), np.exp(b.new - b.mu)
    kept = ~((A < 0) & (b.spread(b.means(b.mu - b.new)) > 0.5))
    loss, slope = clip(ratio, A)
    return plus(
        total(b.by_sequence, kept * loss, kept * slope),
        b.by_sequence,
        0.01 * ratio * k3(b)[0],
        0.01 * ratio * (b.new - b.ref),
    )


def gspo(b: Batch) -> Answer:
    s = b.spread(np.exp(b.means(b.new - b.old)))
    loss, slope = clip(s, b.grpo(), low=3e-4, high=4e-4)
    return total(b.by_sequence, tis(b) * loss, tis(b) * slope)


def lite_ppo(b: Batch) -> Answer:
    A = b.spread(b.centred() / (b.reward.std(ddof=1) + 1e-6))
    return clipped(b, A, b.by_token, tis(b))


def masked(b: Batch, low: float, high: float) -> Answer:
    k = np.exp(b.old - b.mu)
    return clipped(b, b.grpo(), b.by_token, np.where((k >= low) & (k <= high), k, 0))


def mis_sequence(b: Batch) -> Answer:
    rho = b.spread(np.exp(b.sums(b.old - b.mu)))
    return clipped(b, b.grpo(), b.by_answer, np.where(rho <= 2, rho, 0))


def ppo_dual_clip(b: Batch) -> Answer:
    return total(b.by_token, *clip(np.exp(b.new - b.mu), b.whitened(), dual=3.0))


def raft(b: Batch) -> Answer:
    best = [group * SIZE + b.reward[b.group == group].argmax() for group in range(GROUPS)]
    weight = b.spread(np.isin(np.arange(len(b.lengths)), best) / (GROUPS * b.lengths))
    return total(weight, -b.new, -np.ones_like(b.new))


def reinforce(b: Batch) -> Answer:
    A, average = [], b.reward[:SIZE].mean()
    for rewards in b.reward.reshape(GROUPS, SIZE):
        A += list(rewards - average)
        average = 0.95 * average + 0.05 * rewards.mean()
    A_N = b.spread(np.array(A))
    return total(b.by_answer, -tis(b) * A_N * b.new, -tis(b) * A_N)


def reinforce_pp(b: Batch) -> Answer:
    k, A = b.old - b.ref, []
    for start, length, reward in zip(np.cumsum(b.lengths) - b.lengths, b.lengths, b.reward, strict=True):
        A += [reward - 0.01 * k[at : start + length].sum() for at in range(start, start + length)]
    return clipped(b, whiten(np.array(A)), b.by_token, tis(b))


def reinforce_pp_baseline(b: Batch) -> Answer:
    gap = b.new - b.ref
    return plus(clipped(b, b.whitened(), b.by_token, tis(b)), b.by_token, 0.005 * gap**2, 0.01 * gap)


def rloo(b: Batch) -> Answer:
    A = b.spread(SIZE / (SIZE - 1) * b.centred())
    return total(b.by_answer, -tis(b) * A * b.new, -tis(b) * A)


def topr(b: Batch) -> Answer:
    A, rho = b.spread(b.reward - 0.5), b.spread(np.exp(b.sums(b.new - b.mu)))
    alpha = np.where(A < 0, np.minimum(rho, 1), 1)
    return total(b.by_answer, -alpha * A * b.new, -alpha * A)


METHODS: dict[str, Callable[[Batch], Answer]] = {
    "a3po": a3po,
    "cispo": cispo,
    "dapo": dapo,
    "decoupled_ppo": lambda b: clipped(b, b.whitened(), b.by_token, tis(b, 5.0)),
    "dpo": dpo,
    "dr_grpo": lambda b: clipped(b, b.spread(b.centred()), b.by_answer / 3000, tis(b)),
    "grpo": lambda b: clipped(b, b.grpo(), b.by_sequence, tis(b)),
    "grpo_ema": lambda b: with_k3(b, METHODS["grpo"](b), b.by_sequence, 0.04),
    "grpo_entropy": lambda b: plus(METHODS["grpo"](b), b.by_sequence, -0.001 * b.entropy, 0.0),
    "grpo_k2": lambda b: plus(METHODS["grpo"](b), b.by_sequence, 0.02 * (b.new - b.ref) ** 2, 0.04 * (b.new - b.ref)),
    "grpo_kl": lambda b: with_k3(b, METHODS["grpo"](b), b.by_sequence, 0.04),
    "grpo_kl_reward": grpo_kl_reward,
    "grpo_kl_unbiased": grpo_kl_unbiased,
    "grpo_snapshot": lambda b: with_k3(b, clipped(b, b.grpo(), b.by_token, tis(b), high=0.28), b.by_token, 0.01),
    "gspo": gspo,
    "icepop": lambda b: masked(b, 0.5, 5.0),
    "lite_ppo": lite_ppo,
    "mis": lambda b: masked(b, 0.0, 2.0),
    "mis_sequence": mis_sequence,
    "ppo": lambda b: clipped(b, b.whitened(), b.by_token, tis(b)),
    "ppo_dual_clip": ppo_dual_clip,
    "raft": raft,
    "reinforce": reinforce,
    "reinforce_pp": reinforce_pp,
    "reinforce_pp_baseline": reinforce_pp_baseline,
    "replay": lambda b: clipped(b, b.grpo(), b.by_token, tis(b) * (b.age + 1) ** -0.5),
    "rloo": rloo,
    "sft": lambda b: total(b.by_token, -b.new, -np.ones_like(b.new)),
    "topr": topr,
}


def ours(name: str, b: Batch) -> tuple[float, Array, Array]:
    """Loss, its gradient by the log-probabilities, and by the entropies."""
    loaded = recipe.load(name)
    objective = Objective.of(loaded.objective, models=frozenset({"reference"}))
    shaping, sequences = Shaping.of(loaded.rewards), Sequences(b.lengths)
    keeps, advantages, rewards = [], [], []
    for group in range(GROUPS):
        part = slice(group * SIZE, (group + 1) * SIZE)
        tokens = sequences.tokens(part)
        have: dict[str, Any] = {
            "reward_G": b.reward[part].astype(np.float32),
            "length_G": b.lengths[part],
            "max_tokens": LONGEST,
            "sequences": sequences[part],
            "proximal_logprob_N": b.old[tokens],
            "reference_logprob_N": b.ref[tokens],
        }
        have["reward_G"] = shaping.shape(have)
        keeps.append(objective.keep(have))
        advantages.append(objective.advantages(have))
        rewards.append(have["reward_G"])
    keep_S = np.concatenate(keeps)
    keep_N, group_S, kept = np.repeat(keep_S, b.lengths), b.group[keep_S], Sequences(b.lengths[keep_S])
    advantage_N = objective.normalised(np.concatenate(advantages)[keep_N], kept, group_S=group_S)
    words = {
        "advantage_N": advantage_N,
        "weight_N": objective.token_weights(kept, group_S=group_S),
        "logprob_N": b.new[keep_N],
        "proximal_logprob_N": b.old[keep_N],
        "behaviour_logprob_N": b.mu[keep_N],
        "reference_logprob_N": b.ref[keep_N],
        "entropy_N": b.entropy[keep_N],
        "reward_S": np.concatenate(rewards)[keep_S],
    }
    tensors = {word: torch.tensor(x, dtype=torch.float64) for word, x in words.items()}
    wanted = (tensors["logprob_N"].requires_grad_(), tensors["entropy_N"].requires_grad_())
    staleness_N = torch.tensor(b.age[keep_N])
    loss = objective({**tensors, "staleness_N": staleness_N, "sequences": kept, "group_S": group_S}).value
    gradients = np.zeros((2, len(b.new)))
    gradients[:, keep_N] = torch.stack(torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True))
    return float(loss.detach()), *gradients


def test_every_recipe_is_here() -> None:
    assert sorted(METHODS) == sorted(recipe.names())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", METHODS)
def test_loss_and_gradient_are_the_formulas(name: str, seed: int) -> None:
    batch = Batch(seed)
    loss, gradient, of_entropy = ours(name, batch)
    expected, slope = METHODS[name](batch)
    assert np.abs(slope).max() > 1e-5
    np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(gradient, slope, rtol=1e-4, atol=1e-7)
    bonus = -0.001 * batch.by_sequence if name == "grpo_entropy" else 0.0
    np.testing.assert_allclose(of_entropy, np.broadcast_to(bonus, slope.shape), rtol=1e-5)
