"""TRL's losses and their gradients on given numbers. Runs where TRL is installed: `python theirs.py IN.npz OUT.npz`.

The trainers are TRL's own, built by their constructors over a model of two layers, and so is every line that makes
advantages, importance weights and losses. Given are what a model and a sampler would say: completions, rewards, and
log-probabilities under the policy, the old policy, the sampler and the reference.
"""

import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

QUIET = {"use_cpu": True, "report_to": [], "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True}
CONFIGS = {"grpo": (GRPOConfig, GRPOTrainer), "rloo": (RLOOConfig, RLOOTrainer)}


class Batch:
    """S sequences of the lengths given; what is given per token, padded to [S, T]."""

    def __init__(self, given: Any, group_size: int) -> None:
        self.lengths = given["lengths_S"].tolist()
        self.rewards = torch.from_numpy(given["reward_S"])
        self.group_size = group_size
        self.policy = self._padded(given["logprob_N"]).requires_grad_()
        self.old = self._padded(given["proximal_logprob_N"])
        self.sampler = self._padded(given["behaviour_logprob_N"])
        self.reference = self._padded(given["reference_logprob_N"])
        self.entropy = self._padded(given["entropy_N"]).requires_grad_()

    def _padded(self, x_N: Any) -> torch.Tensor:
        parts = torch.from_numpy(x_N).split(self.lengths)
        return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)

    @property
    def mask(self) -> torch.Tensor:
        return torch.arange(max(self.lengths)) < torch.tensor(self.lengths)[:, None]


def small_model(folder: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    core = Tokenizer(WordLevel({"<pad>": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=4, pad_token_id=0, eos_token_id=1, bos_token_id=None, **sizes))
    model.save_pretrained(folder)
    model.config._name_or_path = str(folder)
    return model, tokenizer


def policy_gradient(case: dict[str, Any], batch: Batch, folder: Path) -> torch.Tensor:
    """The loss of GRPOTrainer or RLOOTrainer, with advantages and importance weights of its own making."""
    model, tokenizer = small_model(folder)
    config, trainer_class = CONFIGS[case["trainer"]]
    size = len(batch.lengths)
    args = config(
        output_dir=str(folder),
        per_device_train_batch_size=size,
        num_generations=batch.group_size,
        **QUIET,
        **{"num_iterations": 2, **case["config"]},  # 2: the old policy is not the one being trained
    )
    trainer = trainer_class(
        model=model,
        reward_funcs=lambda **_: [0.0] * size,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["a"] * size}),
        processing_class=tokenizer,
    )
    for name, value in case["attributes"].items():  # what its constructor would load a server or a second model for
        setattr(trainer, name, value)
    trainer.ref_model = "reference"
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    scoring = [True]

    def log_probabilities(which: Any, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor, None]:
        if which == "reference":
            return batch.reference, batch.entropy, None
        return (batch.old if scoring[0] else batch.policy), batch.entropy, None

    def generate(prompts: list[str]) -> tuple[Any, ...]:
        tokens = [[2] * length for length in batch.lengths]
        sampled = [row[:length].tolist() for row, length in zip(batch.sampler, batch.lengths, strict=True)]
        if case["trainer"] == "rloo":
            return [[2]] * size, tokens, ["a"] * size
        return [[2]] * size, tokens, None, ["a"] * size, sampled, {}, None, None

    trainer._generate = generate
    trainer._get_per_token_logps_and_entropies = log_probabilities
    trainer._calculate_rewards = lambda *_: batch.rewards[:, None]
    scored = trainer._generate_and_score_completions([{"prompt": "a"} for _ in range(size)])
    scoring[0] = False
    return trainer.compute_loss(trainer.model, scored)


def preference(case: dict[str, Any], batch: Batch, folder: Path) -> torch.Tensor:
    """The loss of DPOTrainer, the first half of the sequences chosen, the second rejected, in the same order."""
    model, tokenizer = small_model(folder)
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(output_dir=str(folder), **QUIET, **case["config"]),
        train_dataset=Dataset.from_dict({"prompt": ["a"], "chosen": ["b"], "rejected": ["a"]}),
        processing_class=tokenizer,
    )
    trainer.model.train()

    def says(log_probs: torch.Tensor) -> Any:
        zero = torch.zeros_like(log_probs)
        return lambda **_: SimpleNamespace(log_probs=log_probs, entropy=zero, mean_logits=zero, is_top1=zero.bool())

    trainer.ref_model = says(batch.reference)
    prompt = torch.zeros(len(batch.lengths), 1, dtype=torch.long)
    mask = torch.cat([prompt, batch.mask.long()], 1)
    inputs = {"input_ids": torch.full_like(mask, 2), "attention_mask": mask, "completion_mask": mask}
    return trainer.compute_loss(says(batch.policy), inputs)


def main() -> None:
    given = np.load(sys.argv[1])
    torch.set_default_dtype(torch.float64)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for case in json.loads(str(given["cases"])):
            batch = Batch(given, case["group_size"])
            make = preference if case["trainer"] == "dpo" else policy_gradient
            loss = make(case, batch, Path(folder))
            gradient, of_entropy = torch.autograd.grad(
                loss, (batch.policy, batch.entropy), allow_unused=True, materialize_grads=True
            )
            name = case["name"]
            found |= {
                f"{name}.loss": loss.detach().numpy(),
                f"{name}.gradient": gradient[batch.mask].numpy(),
                f"{name}.of_entropy": of_entropy[batch.mask].numpy(),
            }
    np.savez(sys.argv[2], **found)


if __name__ == "__main__":
    main()
