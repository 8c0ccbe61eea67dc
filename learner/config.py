"""What a run tells its learner. Imports no torch: configurations are read in processes that never load it."""

from enum import StrEnum
from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from millrace.core.config import Config

PublishedDtype = Literal["float32", "bfloat16", "float16"]


class Schedule(StrEnum):
    """How the learning rate runs after warm-up."""

    CONSTANT = "constant"
    LINEAR = "linear"
    COSINE = "cosine"


class OptimiserConfig(Config):
    """AdamW and its schedule."""

    learning_rate: PositiveFloat = 1e-6
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the running means of the gradient and of its square."""
    epsilon: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled; on matrices, not on norms and biases."""
    clip_norm: PositiveFloat = 1.0
    """Largest global gradient norm; larger gradients are scaled down to it."""
    schedule: Schedule = Schedule.CONSTANT
    """Of the learning rate after warm-up."""
    warmup_steps: NonNegativeInt = 0
    """Optimiser steps of linear warm-up; a recipe may make several of them a step of the loop."""
    decay_steps: PositiveInt | None = None
    """Optimiser step at which linear and cosine schedules reach `final_ratio`; None: the run's last."""
    final_ratio: float = Field(default=0.0, ge=0.0, le=1.0)
    """Learning rate at the end of linear and cosine schedules, as a share of the peak."""

    @model_validator(mode="after")
    def _decay_has_an_end(self) -> Self:
        end = None if self.schedule is Schedule.CONSTANT else self.decay_steps
        if end is not None and end <= self.warmup_steps:
            raise ValueError(f"decay_steps = {end} lies within warmup_steps = {self.warmup_steps}; raise the first")
        return self


class LoraConfig(Config):
    """Low-rank adapters beside frozen weights: W = W_base + (alpha / rank) * B A. No dropout: engines have none."""

    rank: PositiveInt = 16
    """Columns of B and rows of A."""
    alpha: PositiveFloat = 32.0
    """Over the rank, the scale of the adapters."""
    targets: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Names of the linear layers that get one, such as "q_proj"; None: all in the transformer blocks."""


class LearnerConfig(OptimiserConfig):
    """The learner of a run."""

    token_budget: PositiveInt = 16_384
    """Rows of a micro-batch: what one forward and backward pass holds. Lower it when memory runs out."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of matrix products. Master weights, log-probabilities and the optimiser are float32."""
    gradient_checkpointing: bool = False
    """Activations within a block are computed again in the backward pass: less memory, a second forward pass."""
    compile: bool = False
    """Compile the blocks and what is done to logits: faster on a GPU; the first steps wait for the compiler."""
    lora: LoraConfig | None = None
    """Train low-rank adapters and publish these alone; None: all weights."""
    publish_dtype: PublishedDtype = "float32"
    """Of published weights: what the engines compute in."""
    probe_every: PositiveInt = 1
    """The first published version carries probes, and each so-many-th after it: without them no engine can join."""
    checkpoint_every: PositiveInt = 50
    """Steps between commits. The last step is always committed."""
    checkpoint_keep: PositiveInt = 2
    """Checkpoints kept, besides the one with the best mean reward."""
    seed: NonNegativeInt = 0
    """Of the learner's random numbers."""
    threads: PositiveInt | None = None
    """Of torch on the CPU; None: torch's own choice."""
    device: str | None = None
    """As torch names it; None: the GPU if there is one."""
    skip_gradient_above: PositiveFloat | None = None
    """A gradient of a larger norm makes no optimiser step, its groups leave the batch; None: every finite one does."""
    max_filtered: PositiveInt = 100
    """So many batches' worth of groups filtered for one step end the run: its filters leave nothing to learn from."""
    samples_per_step: NonNegativeInt = 4
    """Rollouts of each step that rollouts.jsonl and the report show; 0: none."""
    queue_deadline_s: PositiveFloat = 300.0
    """How long a call may stay unanswered while the queue restarts."""


class SupervisedConfig(OptimiserConfig):
    """A supervised run."""

    learning_rate: float = 1e-3
    """Peak learning rate."""
    epochs: PositiveInt = 1
    """Passes over the rows, each in an order of its own."""
    batch_rows: PositiveInt = 64
    """Rows of an optimiser step; the last of an epoch may have fewer."""
    token_budget: PositiveInt = 16_384
    """Rows of a micro-batch: what one forward and backward pass holds."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of matrix products; master weights are float32."""
    gradient_checkpointing: bool = False
    """Activations within a block are computed again in the backward pass: less memory, a second forward pass."""
    compile: bool = False
    """Compile the blocks and what is done to logits: faster on a GPU; the first steps wait for the compiler."""
    lora: LoraConfig | None = None
    """Train low-rank adapters and publish these alone; None: all weights."""
    seed: NonNegativeInt = 0
    """Of the order of the rows."""
    threads: PositiveInt | None = None
    """Of torch on the CPU; None: torch's own choice."""
    device: str | None = None
    """As torch names it; None: the GPU if there is one."""
