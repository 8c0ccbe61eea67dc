"""learner/objective.py: whole objectives against padded references, micro-batches, properties, and every refusal."""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from millrace.core import recipe
from millrace.core.errors import RecipeError, TrainingError
from millrace.learner.metrics import Mean
from millrace.learner.objective import Loss, Objective
from millrace.learner.sequences import Sequences

REFERENCE = frozenset({"reference"})
GRPO = recipe.load("grpo").objective


def one_token_each(reward_G: Any) -> dict[str, Any]:
    """The words of a group whose responses have one token each."""
    return {"reward_G": reward_G, "length_G": np.ones(len(reward_G), int), "sequences": Sequences([1] * len(reward_G))}


class Ragged:
    """A random batch: 4 groups of 5 sequences of 0 to 12 tokens, off-policy, with rewards; float64 for comparison."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float64) -> None:
        random = np.random.default_rng(seed)
        self.group_S = np.repeat(np.arange(4), 5)
        self.sequences = Sequences(random.integers(0, 13, 20))
        n = self.sequences.total
        self.rewards = random.integers(0, 2, (4, 5)).astype(np.float32)
        self.rewards[0] = 1.0  # a group without signal
        self.logprob_N = torch.tensor(-random.exponential(1.0, n), dtype=dtype, requires_grad=True)
        policy = self.logprob_N.detach().numpy()
        self.data: dict[str, torch.Tensor] = {
            "proximal_logprob_N": torch.tensor(policy + 0.3 * random.normal(size=n), dtype=dtype),
            "behaviour_logprob_N": torch.tensor(policy + 0.8 * random.normal(size=n), dtype=dtype),
            "reference_logprob_N": torch.tensor(policy + 0.5 * random.normal(size=n), dtype=dtype),
        }
        self.entropy_N = torch.tensor(random.exponential(1.0, n), dtype=dtype, requires_grad=True)
        self.staleness_N = torch.tensor(random.integers(0, 4, n))

    def have(self, objective: Objective, *, without: tuple[str, ...] = ()) -> dict[str, Any]:
        words: dict[str, Any] = {"logprob_N": self.logprob_N, "entropy_N": self.entropy_N, **self.data}
        if objective.learns_from_rewards:
            advantages = [objective.advantages(self.group(at)) for at in range(4)]
            advantage_N = objective.normalised(np.concatenate(advantages), self.sequences, group_S=self.group_S)
            words["advantage_N"] = torch.tensor(advantage_N, dtype=self.logprob_N.dtype)
        weight_N = objective.token_weights(self.sequences, group_S=self.group_S)
        words |= {"weight_N": torch.tensor(weight_N, dtype=self.logprob_N.dtype), "sequences": self.sequences}
        words |= {"staleness_N": self.staleness_N, "reward_S": torch.tensor(self.rewards.ravel())}
        words["group_S"] = np.arange(20) // (2 if objective.keeps_groups_whole else 5)  # what compares, compares pairs
        return {word: value for word, value in words.items() if word not in without}

    def group(self, at: int) -> dict[str, Any]:
        """The words of one group."""
        part = slice(5 * at, 5 * at + 5)
        tokens, sequences = self.sequences.tokens(part), self.sequences[part]
        scored = {word: x_N[tokens].numpy() for word, x_N in self.data.items()}
        return {"reward_G": self.rewards[at], "length_G": sequences.lengths_S, "sequences": sequences, **scored}

    def part(self, have: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
        """The words of some whole sequences, which are sequences start to stop."""
        cut = self.sequences.tokens(slice(start, stop))
        of_sequences = ("sequences", "group_S", "reward_S")
        return {word: value[slice(start, stop) if word in of_sequences else cut] for word, value in have.items()}

    def padded(self, x_N: torch.Tensor) -> torch.Tensor:
        """[S, T], zeros behind each sequence's end."""
        lengths = self.sequences.lengths_S.tolist()
        return torch.nn.utils.rnn.pad_sequence(list(x_N.split(lengths)), batch_first=True)

    def mask(self) -> torch.Tensor:
        return self.padded(torch.ones(self.sequences.total, dtype=torch.bool))


def gradient(value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    (grad,) = torch.autograd.grad(value, x, retain_graph=True)
    return grad


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("name", "coefficient"), [("grpo", 0.0), ("grpo_kl", 0.04)])
def test_grpo_with_truncated_importance_sampling_against_a_padded_reference(
    name: str, coefficient: float, seed: int
) -> None:
    """The textbook form: [S, T] arrays, a mask, advantages from all rewards at once, and means over both axes."""
    batch, objective = Ragged(seed), Objective.of(recipe.load(name).objective, models=REFERENCE)
    loss = objective(batch.have(objective))

    mask = batch.mask()
    reward = torch.tensor(batch.rewards, dtype=torch.float64)
    advantage = ((reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-6)).reshape(-1, 1)
    new, old = batch.padded(batch.logprob_N), batch.padded(batch.data["proximal_logprob_N"])
    ratio = (new - old).exp()
    surrogate = torch.min(ratio * advantage, ratio.clip(0.8, 1.2) * advantage)
    truncated = (old - batch.padded(batch.data["behaviour_logprob_N"])).exp().clip(max=2.0)
    q = (batch.padded(batch.data["reference_logprob_N"]) - new).exp()
    per_token = truncated * surrogate - coefficient * (q - q.log() - 1)
    per_sequence = (per_token * mask).sum(1) / mask.sum(1).clip(min=1)
    expected = -per_sequence.sum() / (mask.any(1)).sum()

    assert float((loss.value - expected).detach().abs()) <= 1e-6
    got, wanted = gradient(loss.value, batch.logprob_N), gradient(expected, batch.logprob_N)
    assert float((got - wanted).abs().max()) <= 1e-6
    assert float(wanted.abs().max()) > 1e-3


@pytest.mark.parametrize("seed", range(5))
def test_gspo_against_a_padded_reference(seed: int) -> None:
    batch = Ragged(seed)
    clipping = {"name": "clip", "low": 0.05, "high": 0.1}
    slots = {"ratio": "sequence", "surrogate": clipping, "aggregation": "sequence_mean"}
    objective = Objective.of(slots)
    have = batch.have(objective)
    mask = batch.mask()
    length = mask.sum(1).clip(min=1)
    difference = batch.padded(batch.logprob_N - batch.data["proximal_logprob_N"])
    ratio = ((difference * mask).sum(1) / length).exp()
    advantage = batch.sequences.mean(have["advantage_N"])
    expected = (
        -(torch.min(ratio * advantage, ratio.clip(0.95, 1.1) * advantage) * mask.any(1)).sum() / mask.any(1).sum()
    )
    loss = objective(have)
    assert float((loss.value - expected).detach().abs()) <= 1e-6
    difference_of_gradients = gradient(loss.value, batch.logprob_N) - gradient(expected, batch.logprob_N)
    assert float(difference_of_gradients.abs().max()) <= 1e-6


def test_nll_against_cross_entropy() -> None:
    """Through real logits: the loss of token_mean is torch's own cross-entropy."""
    logits = torch.randn(30, 11, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(0, 11, (30,))
    objective = Objective.of(recipe.load("sft").objective)
    sequences = Sequences([10, 20])
    weight_N = torch.tensor(objective.token_weights(sequences, group_S=np.arange(2)), dtype=torch.float64)
    logprob_N = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    loss = objective({"logprob_N": logprob_N, "weight_N": weight_N, "sequences": sequences})
    expected = torch.nn.functional.cross_entropy(logits, tokens)
    torch.testing.assert_close(loss.value, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(gradient(loss.value, logits), gradient(expected, logits), atol=1e-8, rtol=0)
    assert loss.metrics["objectives.nll"].value == pytest.approx(expected.item())
    assert not objective.learns_from_rewards
    assert not objective.advantages(one_token_each(np.ones(2))).any()


@pytest.mark.parametrize("name", recipe.names())
def test_micro_batches_add_up_to_the_batch(name: str) -> None:
    """Value, gradient and metrics; cut anywhere between sequences, or between the groups of what compares them."""
    batch, objective = Ragged(3), Objective.of(recipe.load(name).objective, models=REFERENCE)
    have = batch.have(objective)
    whole = objective(have)
    for cuts in ([0, 20], [0, 7, 20], [0, 1, 2, 11, 20], list(range(21))):
        allowed = [cut for cut in cuts if cut % 2 == 0 or not objective.keeps_groups_whole]
        parts = [objective(batch.part(have, a, b)) for a, b in pairwise(allowed)]
        total = torch.stack([part.value for part in parts]).sum()
        torch.testing.assert_close(total, whole.value, atol=1e-12, rtol=0)
        torch.testing.assert_close(
            gradient(total, batch.logprob_N), gradient(whole.value, batch.logprob_N), atol=1e-12, rtol=0
        )
        for metric, mean in whole.metrics.items():
            merged = sum((part.metrics[metric] for part in parts), Mean(0.0, 0.0))
            assert merged.value == pytest.approx(mean.value), metric


@pytest.mark.parametrize("name", recipe.names())
def test_padding_never_existed(name: str) -> None:
    """A sequence's loss does not depend on which others lie beside it."""
    batch, objective = Ragged(4), Objective.of(recipe.load(name).objective, models=REFERENCE)
    have = batch.have(objective)
    before = gradient(objective(have).value, batch.logprob_N)
    cut = batch.sequences.tokens(slice(10, 20))
    with torch.no_grad():
        batch.logprob_N[cut] -= 1.0
    after = gradient(objective(have).value, batch.logprob_N)
    torch.testing.assert_close(before[: cut.start], after[: cut.start])


@pytest.mark.parametrize("name", recipe.names())
def test_skipping_groups_without_advantage_is_exact_where_it_is_said_to_be(name: str) -> None:
    batch, objective = Ragged(5), Objective.of(recipe.load(name).objective, models=REFERENCE)
    have = batch.have(objective)
    if "advantage_N" in objective.asks:
        have["advantage_N"][batch.sequences.tokens(slice(0, 5))] = 0.0  # the first group's
    whole, rest = objective(have), objective(batch.part(have, 5, 20))
    parameters = (batch.logprob_N, batch.entropy_N)
    with_it, without_it = (
        torch.autograd.grad(loss.value, parameters, allow_unused=True, materialize_grads=True) for loss in (whole, rest)
    )
    same = all(torch.equal(a, b) for a, b in zip(with_it, without_it, strict=True))
    assert same == objective.zero_advantage_is_zero_loss
    assert objective.zero_advantage_is_zero_loss == (objective.loss is None and not objective.penalties)


def test_zero_advantage_is_not_claimed_for_what_nobody_knows(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def loss(ratio_N, advantage_N): return -ratio_N * (advantage_N + 1)\n")
    assert Objective.of({}).zero_advantage_is_zero_loss
    assert not Objective.of({"surrogate": f"{tmp_path}/own.py:loss"}).zero_advantage_is_zero_loss
    assert not Objective.of({"penalties": ["entropy"]}).zero_advantage_is_zero_loss
    assert not Objective.of({"loss": "nll"}).zero_advantage_is_zero_loss


def test_the_proximal_policy_is_the_policy_itself_unless_given() -> None:
    """At a batch's only optimiser step the ratio is 1: gradient -A * weight, importance exp(logprob - behaviour)."""
    batch, objective = Ragged(6), Objective.of(GRPO)
    have = batch.have(objective, without=("proximal_logprob_N",))
    loss = objective(have)
    weight_N = (batch.logprob_N - have["behaviour_logprob_N"]).detach().exp().clamp(max=2.0)
    expected = -have["weight_N"] * weight_N * have["advantage_N"]
    torch.testing.assert_close(gradient(loss.value, batch.logprob_N), expected)
    assert loss.metrics["ratio"].value == 1.0


def test_needs_are_what_a_forward_pass_must_supply() -> None:
    def needs(**slots: Any) -> frozenset[str]:
        return Objective.of(slots, models=REFERENCE).needs

    assert needs() == {"logprob_N"}
    assert needs(penalties="k3") == {"logprob_N", "reference_logprob_N"}
    assert needs(penalties=["entropy", "k1"]) == {"logprob_N", "reference_logprob_N", "entropy_N"}
    assert needs(loss="nll") == {"logprob_N"}
    assert Objective.of(GRPO).asks == {
        "logprob_N", "proximal_logprob_N", "behaviour_logprob_N", "ratio_N", "advantage_N",
    }  # fmt: skip
    assert Objective.of({"ratio": "behaviour", "surrogate": "reinforce", "corrections": "icepop"}).needs == {
        "logprob_N"
    }


def test_metrics() -> None:
    batch = Ragged(7)
    slots = {"corrections": "truncated_importance", "penalties": {"name": "k3", "coefficient": 1.0}}
    objective = Objective.of(slots, models=REFERENCE)
    have = batch.have(objective)
    metrics = objective(have).metrics
    new, old, mu = batch.logprob_N.detach(), have["proximal_logprob_N"], have["behaviour_logprob_N"]
    ratio, weight, tokens = (new - old).exp(), (old - mu).exp(), batch.sequences.total
    a = have["advantage_N"]
    clipped = ((ratio > 1.2) & (a > 0)) | ((ratio < 0.8) & (a < 0))
    expected = {
        "ratio": ratio.mean(),
        "clipped": clipped.sum() / (a != 0).sum(),
        "entropy": have["entropy_N"].mean(),
        "importance": weight.mean(),
        "importance_squared": weight.square().mean(),
        "behaviour_kl": (weight - 1 - weight.log()).mean(),
        "corrections.truncated_importance": weight.clamp(max=2.0).mean(),
        "penalties.k3": ((have["reference_logprob_N"] - new).exp() - 1 - (have["reference_logprob_N"] - new)).mean(),
    }
    assert set(metrics) == set(expected)
    for name, value in expected.items():
        assert metrics[name].value == pytest.approx(value.item()), name
    assert 0 < metrics["clipped"].value < 1
    assert metrics["ratio"].weight == tokens and metrics["clipped"].weight == int((a != 0).sum())


def test_metrics_leave_the_gradient_alone_and_need_none() -> None:
    batch, objective = Ragged(8), Objective.of(GRPO)
    have = batch.have(objective)
    with torch.no_grad():
        evaluated = objective(have)
    assert "clipped" not in evaluated.metrics and torch.equal(evaluated.value, objective(have).value.detach())
    loss = objective(have)
    loss.value.backward()  # the graph is whole
    assert batch.logprob_N.grad is not None


def test_an_importance_weight_that_overflows_stays_finite() -> None:
    batch, objective = Ragged(9, torch.float32), Objective.of(GRPO)
    have = batch.have(objective) | {"behaviour_logprob_N": torch.full((batch.sequences.total,), -200.0)}
    loss = objective(have)
    assert torch.isfinite(loss.value) and torch.isfinite(gradient(loss.value, batch.logprob_N)).all()
    assert all(np.isfinite(mean.value) for mean in loss.metrics.values())


def test_a_micro_batch_without_loss_tokens_is_zero() -> None:
    objective = Objective.of(GRPO)
    none: Any = torch.zeros(0, requires_grad=True)
    words = ("logprob_N", "behaviour_logprob_N", "advantage_N", "weight_N")
    loss: Loss = objective(dict.fromkeys(words, none) | {"sequences": Sequences([0, 0])})
    assert loss.value.item() == 0.0 and loss.metrics["ratio"].value == 0.0


REFUSALS: list[tuple[Any, str]] = [
    (
        {"penalties": ["k3"]},
        'this recipe\'s objective asks for reference_logprob_N: give the run a reference model, reference = "path"',
    ),
    (
        {"surrogate": {"name": "clip", "hi": 1.0}},
        "surrogates.clip has no parameter 'hi'; did you mean 'high'? It takes",
    ),
    (
        {"surrogate": {"name": "clip", "low": -0.1}},
        "surrogates.clip: low = -0.1: input should be greater than or equal",
    ),
    ({"advantage": "rlo"}, "unknown advantage 'rlo'; did you mean 'rloo'? millrace.learner.advantages has grpo,"),
    ({"advantag": "rloo"}, "unknown key 'advantag'; did you mean 'advantage'?"),
    ({"aggregation": "constant_length"}, "aggregations.constant_length needs parameter 'length'. It takes length"),
    ({"name": "nll", "advantage": "rloo"}, "'nll' is a whole loss and takes no advantage"),
    ({"name": "nll", "beta": 0.1}, "objectives.nll has no parameter 'beta'. It takes no parameters"),
    ({"corrections": [{"cap": 2.0}]}, 'write "name", or { name = "name", parameter = value }'),
]


@pytest.mark.parametrize(("table", "message"), REFUSALS)
def test_a_recipe_that_cannot_be_composed_says_why(table: Any, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Objective.of(table)
    assert message in str(caught.value)


def own(tmp_path: Path, body: str) -> str:
    (tmp_path / "own.py").write_text(body)
    return f"{tmp_path}/own.py:f"


@pytest.mark.parametrize(
    ("slot", "body", "message"),
    [
        ("ratio", "def f(ratio_N): return ratio_N\n", "A ratio may ask for advantage_N, behaviour_logprob_N,"),
        ("surrogate", "def f(advantage_n): return 0\n", "asks for 'advantage_n'; did you mean 'advantage_N'?"),
        ("penalty", "async def f(logprob_N): return 0\n", "is an async function: only verifiers may be"),
        ("advantage", "def f(logprob_N): return 0\n", "An advantage may ask for behaviour_logprob_N, length_G,"),
    ],
)
def test_ones_own_method_is_checked_before_anything_starts(tmp_path: Path, slot: str, body: str, message: str) -> None:
    key = {"penalty": "penalties"}.get(slot, slot)
    with pytest.raises(RecipeError) as caught:
        Objective.of({key: own(tmp_path, body)})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("slot", "body", "message"),
    [
        (
            "surrogate",
            "def f(ratio_N, advantage_N): return (ratio_N * advantage_N).mean()\n",
            "must return one number per",
        ),
        ("surrogate", "def f(ratio_N): return 0.0\n", "shape [{n}], got float"),
        ("corrections", "def f(ratio_N): return 1 / 0\n", "own.py:f raised ZeroDivisionError: division by zero"),
        ("advantage", "def f(reward_G): return reward_G / 0\n", "it must return 5 finite numbers"),
        ("advantage", "def f(reward_G): return reward_G.mean()\n", "it must return 5 finite numbers"),
        ("aggregation", "def f(sequences): return sequences.lengths_S\n", "must return {n} finite weights, got shape"),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_ones_own_method_returns_is_checked(tmp_path: Path, slot: str, body: str, message: str) -> None:
    batch = Ragged(1)
    objective = Objective.of({slot: own(tmp_path, body)})
    with pytest.raises(TrainingError) as caught:
        objective(batch.have(objective))
    assert message.format(n=batch.sequences.total) in str(caught.value)


def test_a_method_with_memory_is_saved_and_restored_with_the_objective(tmp_path: Path) -> None:
    body = (
        "from dataclasses import dataclass, field\n\n@dataclass\nclass f:\n    decay: float = 0.5\n"
        "    mean: float = field(default=0.0, init=False)\n\n    def __call__(self, reward_G):\n"
        "        self.mean = self.decay * self.mean + (1 - self.decay) * float(reward_G.mean())\n"
        "        return reward_G - self.mean\n"
    )
    table = {"advantage": {"name": own(tmp_path, body), "decay": 0.9}}
    first, second = Objective.of(table), Objective.of(table)
    group = one_token_each(np.array([1.0, 0.0], np.float32))
    first.advantages(group)
    second.restore(first.memory())
    assert first.memory() == {"advantage": {"mean": pytest.approx(0.05)}}
    np.testing.assert_array_equal(first.advantages(group), second.advantages(group))
    with pytest.raises(RecipeError, match="resume with the recipe that the run was started with"):
        Objective.of(table).restore(Objective.of({}).memory())


def test_a_group_without_valid_members_has_no_advantages() -> None:
    assert Objective.of({"advantage": "rloo"}).advantages(one_token_each(np.empty(0))).shape == (0,)


def test_it_says_its_formula() -> None:
    assert str(Objective.of(recipe.load("grpo_kl").objective, models=REFERENCE)) == (
        "sequence_mean of [truncated_importance(cap=2.0) x clip(low=0.2, high=0.2, dual=None) of token and"
        " grpo(divide_by_std=True, epsilon=1e-06) + k3(coefficient=0.04)]"
    )
