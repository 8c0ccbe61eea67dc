"""The policy of a configuration: the model, its adapters, its reference; what its blocks keep, and their compiling."""

import os

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from millrace.core.errors import ModelError
from millrace.learner.attention import NAME, packed_attention
from millrace.learner.config import LearnerConfig, SupervisedConfig
from millrace.learner.flex import never_fall_back
from millrace.learner.lora import Adapters, AdaptersOff
from millrace.learner.model import Policy, device_of, load_model, prove_packing


def load_policy(
    name: str,
    config: LearnerConfig | SupervisedConfig,
    *,
    reference: str | None = None,
    reference_moves: bool = False,
    temperature: float = 1.0,
) -> Policy:
    """Load what a configuration trains.

    Args:
        name: directory or hub id of the model.
        config: says where it lives, what it computes in, and whether it trains adapters.
        reference: likewise, of the model that some objectives need.
        reference_moves: it will follow the policy, so it has weights of its own whatever its name.
        temperature: of sampling.
    Raises:
        ModelError: a model will not do.
        ConfigError: the model lacks a layer that adapters are asked for.
    """
    device = device_of(config.device)
    model = load_model(name, device=device)
    adapters = None if config.lora is None else Adapters(model, config.lora, name=name, seed=config.seed)
    if config.gradient_checkpointing:
        checkpoint_blocks(model)
    other: PreTrainedModel | AdaptersOff | None = None
    if reference is not None and adapters is not None and not reference_moves and _same(reference, name):
        other = AdaptersOff(adapters)
    elif reference is not None:
        other = load_model(reference, device=device)
    if config.compile:
        for each in (model, other):
            if isinstance(each, PreTrainedModel):
                compile_blocks(each)
    return Policy(
        model,
        reference=other,
        reference_moves=reference_moves,
        adapters=adapters,
        temperature=temperature,
        compute_dtype=getattr(torch, config.compute_dtype),
        compiled=config.compile,
    )


def _same(name: str, other: str) -> bool:
    return name == other or os.path.realpath(name) == os.path.realpath(other)


def blocks_of(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """The model's blocks, in order."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def compile_blocks(model: PreTrainedModel, *, backend: str = "inductor") -> None:
    """Compile what blocks do before and after attention, once for all of them and for rows of every length.

    The bits of a step then depend on the compiler too: one kernel for all lengths keeps a redone step the same.

    Args:
        backend: of torch.compile.
    Raises:
        ModelError: the architecture has no blocks, or its blocks compute differently then.
    """
    kind = model.config.model_type
    blocks = blocks_of(model)
    if not blocks:
        raise ModelError(f"model type '{kind}' has no blocks that can be compiled; set compile to false")
    # The compiler ends at attention and begins after it: a plan is no tensor, and flex.py's kernel is compiled anyway.
    AttentionInterface.register(NAME, torch.compiler.disable(packed_attention))
    never_fall_back()
    for block in blocks:
        block.compile(backend=backend, dynamic=True)
    try:
        prove_packing(model)
    except ModelError as caught:
        raise ModelError(f"model type '{kind}' computes differently when compiled: {caught}") from None


def checkpoint_blocks(model: PreTrainedModel) -> None:
    """Keep only the input of each block, and compute the rest again in the backward pass: transformers' own way.

    Raises:
        ModelError: the architecture does not offer it, or its blocks draw dropout then.
    """
    kind = model.config.model_type
    blocks = blocks_of(model)
    if not model.supports_gradient_checkpointing or not blocks:
        raise ModelError(
            f"model type '{kind}' has no blocks that transformers can checkpoint; set gradient_checkpointing to false"
        )
    # Nothing in a block is random, so the generators' states need not be kept for the second pass.
    kwargs = {"use_reentrant": False, "preserve_rng_state": False}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    model.disable_input_require_grads()  # only reentrant checkpointing needs the embedding's outcome to carry one
    for block in blocks:
        block.training = True  # transformers asks for it; the modules within stay as they are, without dropout
    try:
        prove_packing(model)
    except ModelError as caught:
        raise ModelError(f"model type '{kind}' computes differently with gradient checkpointing: {caught}") from None
