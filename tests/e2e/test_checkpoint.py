"""What a run leaves opens directly in vLLM, and computes there what it computes in transformers."""

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from examples import tiny_model
from millrace.actors.engines import engine
from millrace.learner import checkpoint
from millrace.learner.config import LearnerConfig, LoraConfig, OptimiserConfig
from millrace.learner.loading import load_policy
from millrace.learner.optimiser import Optimiser
from millrace.learner.tokenizer import load_tokenizer

pytestmark = pytest.mark.ray


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)], ids=["full", "lora"])
def test_a_checkpoint_opens_in_vllm_and_in_transformers(lora: LoraConfig | None, tmp_path: Path) -> None:
    tiny_model.build(tmp_path / "model", seed=5)
    policy = load_policy(str(tmp_path / "model"), LearnerConfig(lora=lora, device="cpu"))
    before = policy.score(np.arange(4, 24, dtype=np.int32))
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    assert np.abs(policy.score(np.arange(4, 24, dtype=np.int32)) - before).max() > 0.05
    saved = checkpoint.save(
        str(tmp_path / "checkpoints"),
        checkpoint.LearnerState(step=3, version=3, epoch=1, seed=0),
        policy=policy,
        tokenizer=load_tokenizer(str(tmp_path / "model")),
        optimiser=Optimiser(policy.model.named_parameters(), OptimiserConfig()),
    )
    token_T = np.random.default_rng(0).integers(4, 100, 24).astype(np.int32)

    async def in_vllm() -> np.ndarray:
        opened = engine("vllm", model=saved.directory, slots=4, max_model_len=32)
        try:
            return await opened.score(token_T)
        finally:
            await opened.close()

    with torch.no_grad():
        logits_TV = AutoModelForCausalLM.from_pretrained(saved.directory)(torch.tensor(token_T[None])).logits[0]
    expected_T = torch.log_softmax(logits_TV[:-1], -1).gather(1, torch.tensor(token_T[1:, None]).long())[:, 0].numpy()
    np.testing.assert_allclose(asyncio.run(in_vllm()), expected_T, atol=1e-5)
    np.testing.assert_allclose(policy.score(token_T), expected_T, atol=1e-5)
