"""What a run tells its reward workers."""

import math

from pydantic import Field, model_validator

from millrace.core.config import Config


class JudgeConfig(Config):
    """How a verifier is called, and what of its answers is accepted."""

    concurrency: int = Field(default=32, ge=1)
    """Verdicts in the making at the same time; a synchronous verifier gets as many threads. Slow verdicts, of a
    service elsewhere, need rollouts per second times the mean seconds of a verdict, over all workers."""

    deadline_s: float = Field(default=30.0, gt=0)
    """A verdict that takes longer is a judge failure: no score, masked and counted. Keep it below judge_lease_s."""

    lowest: float = 0.0
    """The least score; what a response that cannot be judged trains as."""

    highest: float = 1.0
    """The greatest score."""

    max_judge_failures: int = Field(default=64, ge=1)
    """So many judge failures in a row, without one score among them, end the run with their cause. Once there was a
    score, so many prompts must have failed in a row."""

    @model_validator(mode="after")
    def _range_is_one(self) -> "JudgeConfig":
        if not (math.isfinite(self.lowest) and math.isfinite(self.highest) and self.lowest < self.highest):
            raise ValueError(f"lowest = {self.lowest} and highest = {self.highest}: give finite numbers, lowest first")
        return self


class RewardConfig(JudgeConfig):
    """How many reward workers judge, and how."""

    workers: int = Field(default=1, ge=1)
    """Reward workers of the run."""

    groups: int = Field(default=64, ge=1)
    """Groups that a worker has in hand at most while verdicts are fast. While they are slow it holds so many that
    twice `concurrency` verdicts are missing; a group that waits for its last one alone counts as one."""

    poll_s: float = Field(default=10.0, gt=0)
    """How long a request for groups waits at the queue before it returns empty-handed."""

    pack_groups: int = Field(default=8, ge=1)
    """Groups and verdicts travel in packs of about so many; a quarter of a step's groups keeps the calls few."""

    linger_s: float = Field(default=0.2, ge=0)
    """How long a pack may take to fill."""

    heartbeat_s: float = Field(default=1.0, gt=0)
    """Between two heartbeats."""

    silence_s: float = Field(default=60.0, gt=0)
    """How long the queue may fail to answer before the worker gives up."""
