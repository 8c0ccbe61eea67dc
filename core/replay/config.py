"""What a run tells its queue. What would deadlock is refused here, with its numbers."""

from typing import Literal, Self

from pydantic import Field, model_validator

from millrace.core.config import Config
from millrace.core.replay import limiter, selectors

StaleRule = Literal["wait", "mask", "train", "drop", "requeue"]


class QueueConfig(Config):
    """Sizes, bounds and durations of the ledger."""

    groups_per_step: int = Field(ge=1)
    """B: groups that one optimiser step learns from."""

    group_size: int = Field(ge=1)
    """n: rollouts of one group."""

    steps: int = Field(ge=1)
    """K: optimiser steps of the run. No draw is granted that they cannot use."""

    max_lag: int = Field(default=1, ge=0)
    """Updates between the weights that sampled a token and those it trains. 0 is the synchronous system."""

    stale: StaleRule = "wait"
    """What happens to groups that would exceed max_lag: the batch waits for them, their old tokens leave the loss
    (mask), they train all the same (train), they are dropped, or drawn again (requeue)."""

    requeues: int = Field(default=0, ge=0)
    """How often the rule `requeue` draws the same draw again before `stale_then` applies."""

    stale_then: Literal["mask", "train", "drop"] = "drop"
    """The rule after `requeues` times."""

    selector: str | None = None
    """The order in which scored groups are taken: fifo, freshest or deadline. By default deadline under the rule
    `wait`, else fifo; max_lag = 0 takes in lease order and nothing else."""

    min_groups: int = Field(default=0, ge=0)
    """Scored groups before the first batch is taken."""

    attempts: int = Field(default=3, ge=1)
    """How often a draw may fail before it is dead and another takes its place."""

    judge_retries: int = Field(default=1, ge=0)
    """How often a group whose judge failed is judged again, elsewhere, before its rollouts are masked."""

    judge_expiries: int = Field(default=3, ge=0)
    """How many leases of reward workers may end without a verdict before the group has failed."""

    start_s: float = Field(default=300.0, gt=0)
    """A lease of a draw ends when no token came for so long after it was granted: time for queueing and loading."""

    lease_s: float = Field(default=30.0, gt=0)
    """A lease of a draw ends when no token came for so long after the last one."""

    lease_cap_s: float = Field(default=3600.0, gt=0)
    """No lease of a draw lasts longer, whatever progress it reports."""

    judge_lease_s: float = Field(default=60.0, gt=0)
    """A lease of a reward worker ends when no progress was reported for so long."""

    judge_cap_s: float = Field(default=600.0, gt=0)
    """No lease of a reward worker lasts longer."""

    keep_commits: int = Field(default=1, ge=1)
    """Checkpoints the run can fall back to: groups live until the oldest of them has passed their step."""

    @property
    def capacity(self) -> int:
        """Groups that may be alive at once."""
        return limiter.capacity(groups_per_step=self.groups_per_step, max_lag=self.max_lag)

    @property
    def order(self) -> str:
        """The selector in use."""
        if self.max_lag == 0:
            return "fifo"
        return self.selector or ("deadline" if self.stale == "wait" else "fifo")

    @property
    def rate(self) -> limiter.RateLimiter:
        """Every group is sampled once; what is ahead of the learner is bounded by capacity."""
        return limiter.RateLimiter(min_size=self.min_groups, max_diff=float(self.capacity))

    @model_validator(mode="after")
    def _refuse_what_deadlocks(self) -> Self:
        if self.min_groups > self.capacity:
            raise ValueError(
                f"min_groups = {self.min_groups} can never be reached: max_lag = {self.max_lag} and groups_per_step = "
                f"{self.groups_per_step} admit {self.capacity} groups before the first step. "
                f"Lower min_groups to {self.capacity} or raise max_lag"
            )
        if self.min_groups > self.steps * self.groups_per_step:
            raise ValueError(
                f"min_groups = {self.min_groups} is more than the run ever draws: steps = {self.steps} times "
                f"groups_per_step = {self.groups_per_step}"
            )
        if (self.stale == "requeue") != (self.requeues > 0):
            raise ValueError(
                f"stale = '{self.stale}' with requeues = {self.requeues}: the rule 'requeue' needs requeues >= 1, "
                "and no other rule takes it"
            )
        if self.selector is not None and self.selector not in selectors.__all__:
            raise ValueError(f"unknown selector '{self.selector}': it is one of {', '.join(selectors.__all__)}")
        if self.max_lag == 0 and self.selector not in (None, "fifo"):
            raise ValueError(
                f"selector = '{self.selector}' with max_lag = 0: a synchronous batch is the first groups in lease "
                "order, or refill would prefer short answers. Leave selector out or raise max_lag"
            )
        for name, cap in (("start_s", "lease_cap_s"), ("lease_s", "lease_cap_s"), ("judge_lease_s", "judge_cap_s")):
            if getattr(self, name) > getattr(self, cap):
                raise ValueError(
                    f"{name} = {getattr(self, name):g} is longer than its cap {cap} = {getattr(self, cap):g}"
                )
        return self
