"""Our compositions against TRL's own trainers, on ragged random batches: loss and gradient.

TRL has an environment of its own, which `make test-trl` makes. Each case names the TRL configuration, the recipe that
it is here (None: a composition that no recipe has), and what of the recipe is set otherwise to compare the same thing.

TRL 1.16 differs from the papers, and so from our recipes, in this:
- 1e-4 is added to the standard deviation, 1e-6 here.
- CISPO is a mean over all tokens, in equation 4 over those of each prompt; epsilon_high is the bound, not its distance
  from 1.
- RLOO clips the ratio of the whole sequence as PPO does; the paper's is REINFORCE.
- The entropy bonus is a mean over tokens whatever weighs the rest; here it is weighed as the surrogate is.
- A sequence without loss tokens counts in the means over sequences; here it does not.
- "bnpo" divides by the tokens of a micro-batch, so that the loss depends on how the batch is cut; here it never does.
- IPO divides each log-ratio by its length; ours is equation 17 as printed, and is not compared.
"""

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from millrace.core import recipe
from millrace.learner.objective import Objective
from millrace.learner.sequences import Sequences
from millrace.rewards.shaping import Shaping

PYTHON = Path(__file__).resolve().parents[2] / ".venv-trl" / "bin" / "python"
THEIRS = Path(__file__).with_name("theirs.py")
REFERENCE = frozenset({"reference"})
GROUP_SIZE, LENGTH = 4, 9
# TRL adds 1e-4 to the standard deviation.
GRPO = {"name": "grpo", "epsilon": 1e-4}
CLIP = {"name": "clip", "low": 0.2, "high": 0.2}
NO_KL = {"penalties": []}

pytestmark = [
    pytest.mark.trl,
    pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-trl: `make test-trl` makes it"),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """TRL's configuration, and ours."""

    name: str
    trainer: str = "grpo"
    config: Mapping[str, Any] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)  # of the trainer, after its constructor
    recipe: str | None = None
    change: Mapping[str, Any] = field(default_factory=dict)  # of the objective
    rewards: Mapping[str, Any] = field(default_factory=dict)
    sampler_is_old: bool = False  # TRL without vLLM: whoever sampled is the old policy

    def objective(self) -> Objective:
        base = {} if self.recipe is None else recipe.load(self.recipe).objective.model_dump(exclude_unset=True)
        return Objective.of({**base, **self.change}, models=REFERENCE)


def vllm(mode: str, **bounds: float) -> dict[str, Any]:
    """What TRL sets when it samples by vLLM."""
    cap = {f"vllm_importance_sampling_clip_{end}": bounds.get(end) for end in ("min", "max")}
    return {
        "use_vllm": True,
        "vllm_importance_sampling_correction": True,
        "vllm_importance_sampling_mode": mode,
        **cap,
    }


NO_CORRECTION: dict[str, Any] = {"corrections": []}
CASES = [
    # loss_type: the aggregation
    Case(name="grpo", config={"loss_type": "grpo"}, recipe="grpo", change={"advantage": GRPO, **NO_CORRECTION}),
    Case(
        name="bnpo",
        config={"loss_type": "bnpo"},
        change={"advantage": GRPO, "surrogate": CLIP, "aggregation": "token_mean"},
    ),
    Case(
        name="dapo",
        config={"loss_type": "dapo", "epsilon_high": 0.28},
        recipe="dapo",
        change={"advantage": GRPO, **NO_CORRECTION},
    ),
    Case(
        name="dr_grpo",
        config={"loss_type": "dr_grpo", "scale_rewards": "none", "max_completion_length": LENGTH},
        recipe="dr_grpo",
        change={"aggregation": {"name": "constant_length", "length": LENGTH}, **NO_CORRECTION},
    ),
    Case(
        name="lite_ppo",
        config={"loss_type": "dapo", "scale_rewards": "batch"},
        recipe="lite_ppo",
        change={"normaliser": {"name": "batch_std", "epsilon": 1e-4}, **NO_CORRECTION},
    ),
    Case(
        name="luspo",
        config={"loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon": 0.05, "epsilon_high": 0.1},
        recipe="gspo",
        change={
            "advantage": GRPO,
            "surrogate": {"name": "clip", "low": 0.05, "high": 0.1},
            "aggregation": "sequence_sum",
            **NO_CORRECTION,
        },
    ),
    # the surrogate and the ratio
    Case(
        name="cispo",
        config={"loss_type": "cispo", "epsilon_high": 2.0},  # the bound itself; here it is 1 + high
        recipe="cispo",
        change={
            "advantage": GRPO,
            "ratio": "token",
            "surrogate": {"name": "cispo", "high": 1.0},
            "aggregation": "token_mean",  # equation 4 has a mean over the tokens of each prompt, TRL over all tokens
        },
    ),
    Case(
        name="gspo",
        config={"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.05, "epsilon_high": 0.1},
        recipe="gspo",
        change={"advantage": GRPO, "surrogate": {"name": "clip", "low": 0.05, "high": 0.1}, **NO_CORRECTION},
    ),
    Case(
        name="two_sided",
        config={"loss_type": "dapo", "delta": 1.5},
        recipe="ppo_dual_clip",
        change={"advantage": GRPO, "normaliser": None, "ratio": "token", "surrogate": {**CLIP, "dual": 1.5}},
    ),
    Case(
        name="rloo",
        trainer="rloo",
        config={"beta": 0.0},
        recipe="rloo",
        change={"ratio": "sequence_product", "surrogate": CLIP, "aggregation": "sequence_mean", **NO_CORRECTION},
    ),
    Case(
        name="rloo_kl",
        trainer="rloo",
        attributes={"beta": 0.05},
        recipe="rloo",
        change={"ratio": "sequence_product", "surrogate": CLIP, "aggregation": "sequence_mean", **NO_CORRECTION},
        rewards={"shapers": [{"name": "kl", "coefficient": 0.05, "estimator": "k1"}]},
    ),
    # the penalties
    Case(
        name="k3",
        config={"loss_type": "grpo", "use_bias_correction_kl": False},
        attributes={"beta": 0.04},
        recipe="grpo_kl",
        change={"advantage": GRPO, **NO_CORRECTION},
    ),
    Case(
        name="k3_unbiased",
        config={"loss_type": "grpo", "use_bias_correction_kl": True, "scale_rewards": "none"},
        attributes={"beta": 0.01},
        recipe="grpo_kl_unbiased",
        change=NO_CORRECTION,
        sampler_is_old=True,
    ),
    Case(
        name="entropy",
        config={"loss_type": "dapo", "entropy_coef": 0.01},
        recipe="grpo_entropy",
        change={
            "advantage": GRPO,
            "penalties": [{"name": "entropy", "coefficient": 0.01}],
            "aggregation": "token_mean",  # TRL's bonus is a mean over tokens, whatever the loss type
            **NO_CORRECTION,
        },
    ),
    # the corrections
    Case(
        name="token_truncate",
        config={"loss_type": "grpo"},
        attributes=vllm("token_truncate", max=2.0),
        recipe="grpo",
        change={"advantage": GRPO},
    ),
    Case(
        name="token_mask",
        config={"loss_type": "dapo"},
        attributes=vllm("token_mask", max=2.0),
        recipe="mis",
        change={"advantage": GRPO},
    ),
    Case(
        name="icepop",
        config={"loss_type": "dapo"},
        attributes=vllm("token_mask", min=0.5, max=5.0),
        recipe="icepop",
        change={"advantage": GRPO},
    ),
    Case(
        name="sequence_truncate",
        config={"loss_type": "dapo"},
        attributes=vllm("sequence_truncate", max=3.0),
        recipe="mis",
        change={"advantage": GRPO, "corrections": {"name": "sequence_truncated_importance", "cap": 3.0}},
    ),
    Case(
        name="sequence_mask",
        config={"loss_type": "dapo"},
        attributes=vllm("sequence_mask", min=0.1, max=3.0),
        recipe="mis_sequence",
        change={
            "advantage": GRPO,
            "corrections": {"name": "sequence_masked_importance", "low": 0.1, "high": 3.0},
            "aggregation": "token_mean",
        },
    ),
    Case(
        name="off_policy_mask",
        config={"loss_type": "grpo", "off_policy_mask_threshold": 0.05},
        # Without vLLM's correction the ratio is to the old policy, and the mask looks at the sampler.
        recipe="grpo_kl_unbiased",
        change={
            "advantage": GRPO,
            "ratio": "token",
            "corrections": {"name": "off_policy_mask", "threshold": 0.05},
            **NO_KL,
        },
    ),
    # preferences
    Case(
        name="dpo",
        trainer="dpo",
        config={"loss_type": "sigmoid", "beta": 0.3},
        recipe="dpo",
        change={"loss": {"name": "dpo", "beta": 0.3}},
    ),
    Case(
        name="raft",
        trainer="dpo",
        config={"loss_type": "sft"},  # on what was chosen
        recipe="raft",
        change={"aggregation": "token_mean"},
    ),
]


class Batch:
    """5 groups of 4, or 10 pairs, of 1 to 9 tokens; float64."""

    def __init__(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        self.sequences = Sequences(random.integers(1, LENGTH + 1, 20))
        n = self.sequences.total
        policy = -random.exponential(1.0, n)
        self.words = {
            "logprob_N": policy,
            "proximal_logprob_N": policy + 0.3 * random.normal(size=n),
            "behaviour_logprob_N": policy + 0.5 * random.normal(size=n),
            "reference_logprob_N": policy + 0.5 * random.normal(size=n),
            "entropy_N": random.exponential(1.0, n),
        }
        self.reward_S = random.integers(0, 3, 20) / 2
        self.reward_S[:4] = 1.0  # a group without signal

    def given(self) -> dict[str, Any]:
        return {"lengths_S": self.sequences.lengths_S, "reward_S": self.reward_S, **self.words}

    def ours(self, case: Case) -> tuple[float, Any, Any]:
        objective = case.objective()
        words = {name: torch.tensor(x_N, requires_grad=False) for name, x_N in self.words.items()}
        if case.sampler_is_old:
            words["behaviour_logprob_N"] = words["proximal_logprob_N"]
        policy, entropy = words["logprob_N"].requires_grad_(), words["entropy_N"].requires_grad_()
        if case.trainer == "dpo":
            loss = self._preference(objective, words)
        else:
            loss = self._policy_gradient(objective, words, Shaping.of(recipe.Rewards.model_validate(case.rewards)))
        gradients = torch.autograd.grad(loss, (policy, entropy), allow_unused=True, materialize_grads=True)
        return float(loss.detach()), *(gradient.numpy() for gradient in gradients)

    def _policy_gradient(self, objective: Objective, words: dict[str, torch.Tensor], shaping: Shaping) -> torch.Tensor:
        group_S, advantages = np.repeat(np.arange(5), GROUP_SIZE), []
        for at in range(5):
            part = slice(at * GROUP_SIZE, (at + 1) * GROUP_SIZE)
            tokens, sequences = self.sequences.tokens(part), self.sequences[part]
            have: dict[str, Any] = {name: x_N[tokens] for name, x_N in self.words.items()}
            have |= {"sequences": sequences, "length_G": sequences.lengths_S, "reward_G": self.reward_S[part]}
            have["reward_G"] = shaping.shape(have)
            advantages.append(objective.advantages(have))
        advantage_N = objective.normalised(np.concatenate(advantages), self.sequences, group_S=group_S)
        return self._loss(objective, words, self.sequences, group_S, advantage_N=torch.tensor(advantage_N).double())

    def _preference(self, objective: Objective, words: dict[str, torch.Tensor]) -> torch.Tensor:
        """The first ten sequences were chosen, the others rejected: pair 3 is sequences 3 and 13."""
        group_S, reward_S = np.tile(np.arange(10), 2), np.repeat([1.0, 0.0], 10)
        assert objective.selection is not None
        kept = np.zeros(20, np.bool_)
        for pair in range(10):
            kept[[pair, pair + 10]] = objective.keep({"reward_G": reward_S[[pair, pair + 10]].astype(np.float32)})
        kept_N = torch.from_numpy(self.sequences.spread(kept))
        words = {name: x_N[kept_N] for name, x_N in words.items()}
        sequences = Sequences(self.sequences.lengths_S[kept])
        return self._loss(objective, words, sequences, group_S[kept], reward_S=torch.from_numpy(reward_S[kept]))

    @staticmethod
    def _loss(
        objective: Objective, words: dict[str, torch.Tensor], sequences: Sequences, group_S: Any, **more: Any
    ) -> torch.Tensor:
        weight_N = torch.from_numpy(objective.token_weights(sequences, group_S=group_S)).double()
        return objective({**words, "weight_N": weight_N, "sequences": sequences, "group_S": group_S, **more}).value


@pytest.fixture(scope="module", params=[0, 1])
def answers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Batch, Any]:
    """A batch, and all that TRL says of it: one process for all cases."""
    batch, folder = Batch(request.param), tmp_path_factory.mktemp("trl")
    cases = [
        {key: getattr(case, key) for key in ("name", "trainer", "config", "attributes")} | {"group_size": GROUP_SIZE}
        for case in CASES
    ]
    np.savez(folder / "in.npz", cases=json.dumps(cases), **batch.given())
    command = [str(PYTHON), str(THEIRS), str(folder / "in.npz"), str(folder / "out.npz")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-4000:]
    return batch, np.load(folder / "out.npz")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_loss_and_gradient_are_trls(case: Case, answers: tuple[Batch, Any]) -> None:
    batch, theirs = answers
    loss, gradient, of_entropy = batch.ours(case)
    assert abs(gradient).max() > 1e-3
    np.testing.assert_allclose(loss, theirs[f"{case.name}.loss"], atol=1e-6, rtol=1e-6)
    np.testing.assert_allclose(gradient, theirs[f"{case.name}.gradient"], atol=1e-6, rtol=1e-5)
    np.testing.assert_allclose(of_entropy, theirs[f"{case.name}.of_entropy"], atol=1e-6)
