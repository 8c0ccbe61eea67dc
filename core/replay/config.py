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

    reuse: int = Field(default=1, ge=1)
    """Steps that may train one group. Each use is an entry of another step's batch, with a lag of its own.

    Promised is the first use alone, and `stale` speaks of it alone. A further use is made when the one before it is
    trained, within max_lag, or not at all: what the run's end or its age leaves unused was trained, not wasted, and a
    group that a filter rejects is not used again. A lease reserves `reuse` places, so that the run draws about
    steps * groups_per_step / reuse groups."""

    min_groups: int = Field(default=0, ge=0)
    """Scored groups before the first batch is taken."""

    attempts: int = Field(default=3, ge=1)
    """How often a draw may fail before it is dead and another takes its place."""

    crashes: int = Field(default=3, ge=1)
    """How often whoever works on a draw, an engine or a judge, may crash or hang before the draw is dead. From the
    second time on a worker holds one such suspect at a time, so that a poison prompt is told from its neighbours."""

    max_dead: int = Field(default=32, ge=1)
    """Dead draws that end the run: so many prompts fail that the data, or what judges it, must be wrong."""

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

    keep_commits: int = Field(default=2, ge=1)
    """Checkpoints the run can fall back to: groups live until the oldest of them has passed their step."""

    @property
    def capacity(self) -> int:
        """Places of batches that may be reserved at once: `reuse` of them for every group alive."""
        return limiter.capacity(groups_per_step=self.groups_per_step, max_lag=self.max_lag)

    @property
    def stagger(self) -> int:
        """Places that reservations leave free, so that every use finds a step of its own.

        Where groups_per_step / reuse groups are granted in each step, the last steps they may stand in fill up from
        use to use: by j / reuse, j = 1 to reuse. What is then empty is groups_per_step * (reuse - 1) / 2.
        """
        return self.groups_per_step * (self.reuse - 1) // 2

    @property
    def order(self) -> str:
        """The selector in use."""
        if self.max_lag == 0:
            return "fifo"
        return self.selector or ("deadline" if self.stale == "wait" else "fifo")

    @property
    def rate(self) -> limiter.RateLimiter:
        """Every group is sampled `reuse` times at most; what is ahead of the learner is bounded by capacity."""
        return limiter.RateLimiter(
            min_size=self.min_groups, max_diff=float(self.capacity), samples_per_insert=float(self.reuse)
        )

    @model_validator(mode="after")
    def _refuse_uses_that_are_too_old(self) -> Self:
        if self.reuse > self.max_lag + 1:
            raise ValueError(
                f"reuse = {self.reuse} with max_lag = {self.max_lag}: each use is in another step, so that the last "
                f"one is at least {self.reuse - 1} updates old, and max_lag allows {self.max_lag}. "
                f"Lower reuse to {self.max_lag + 1} or raise max_lag to {self.reuse - 1}, better to more"
            )
        return self

    @model_validator(mode="after")
    def _refuse_what_deadlocks(self) -> Self:
        uses = f", reuse = {self.reuse}" if self.reuse > 1 else ""
        most = max(self.groups_per_step, (self.capacity - self.stagger) // self.reuse)
        if self.min_groups > most:
            raise ValueError(
                f"min_groups = {self.min_groups} can never be reached: max_lag = {self.max_lag}{uses} and "
                f"groups_per_step = {self.groups_per_step} admit {most} groups before the first step. "
                f"Lower min_groups to {most} or raise max_lag"
            )
        each = min(self.reuse, self.steps)
        if self.min_groups > -(-self.steps * self.groups_per_step // each):
            raise ValueError(
                f"min_groups = {self.min_groups} is more than the run ever draws: steps = {self.steps} times "
                f"groups_per_step = {self.groups_per_step}" + (f", each used {each} times" if each > 1 else "")
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
