"""What a run tells its generation workers and its held-out evaluation. Imports no torch."""

from pydantic import Field, model_validator

from millrace.core.config import Config


class GenerationConfig(Config):
    """How a generation worker keeps its engine busy."""

    slots: int = Field(default=64, ge=1)
    """Responses that the engine generates at the same time."""

    prefetch: int | None = Field(default=None, ge=0)
    """Groups leased beyond what fills the slots; None: half of what fills them, at least one."""

    poll_s: float = Field(default=10.0, gt=0)
    """How long a request for leases waits at the queue before it returns empty-handed."""

    pack_groups: int = Field(default=8, ge=1)
    """Finished groups leave in packs of about so many; a quarter of a step's groups keeps the calls few."""

    linger_s: float = Field(default=0.2, ge=0)
    """How long a finished group waits at most for its pack to fill. It does not wait when nothing else is in hand."""

    heartbeat_s: float = Field(default=1.0, gt=0)
    """Between two heartbeats."""

    probe_every: int = Field(default=16, ge=1)
    """The weights are proved by probes at the first load and at every k-th after it."""

    silence_s: float = Field(default=60.0, gt=0)
    """How long the queue or the weight store may fail to answer before the worker gives up."""

    check_wiring: bool = True
    """A vLLM engine proves at its start that it computes with every tensor loaded into it, see engines/wiring.py. It
    costs one load of the model in transformers."""

    weights_s: float = Field(default=600.0, gt=0)
    """How long a lease may wait for the weights it asks for; the run's first ones are waited for without limit."""

    max_engine_failures: int = Field(default=8, ge=1)
    """So many failed groups in a row, without a finished one among them, end the worker with their cause."""


class EvaluationConfig(Config):
    """How often and how the policy is evaluated on held-out prompts."""

    every: int = Field(default=10, ge=1)
    """Optimiser steps between two evaluations."""

    samples: int = Field(default=1, ge=1)
    """Responses to each prompt: the n of mean@n, and the n out of which pass@k is estimated."""

    pass_at: tuple[int, ...] = (1,)
    """The k of pass@k, each at most `samples`."""

    temperature: float = Field(default=1.0, ge=0)
    """Of sampling; 0 is greedy, where the engine has it."""

    max_tokens: int = Field(default=1024, ge=1)
    """Longest response, tokens."""

    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a response."""

    correct_from: float = 1.0
    """A response counts as correct for pass@k from this score on."""

    slots: int = Field(default=64, ge=1)
    """Responses generated at the same time."""

    seed: int = 0
    """Of sampling. Each (prompt, member) has its own seed, the same in every evaluation."""

    @model_validator(mode="after")
    def _samples_suffice(self) -> "EvaluationConfig":
        for k in self.pass_at:
            if not 1 <= k <= self.samples:
                raise ValueError(f"pass_at has k = {k}, but k must lie between 1 and samples = {self.samples}")
        return self
