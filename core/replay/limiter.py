"""Pure rules of rate: samples per insert, capacity, and what would deadlock, with its numbers.

Source: rate limiters of Reverb (Cassirer et al. 2021), arXiv:2102.04736.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RateLimiter:
    """Keeps samples / inserts near a ratio: diff = inserts * samples_per_insert - samples stays in [0, max_diff].

    Raises:
        ValueError: a limit that would block both sides for ever.

    >>> limiter = RateLimiter(min_size=4, max_diff=8)
    >>> limiter.may_sample(inserts=3, samples=0, want=2), limiter.may_sample(inserts=4, samples=0, want=4)
    (False, True)
    >>> limiter.may_insert(inserts=8, samples=0), limiter.may_insert(inserts=8, samples=1)
    (False, True)
    """

    min_size: int  # inserts before the first sample
    max_diff: float  # inserts ahead of samples, in samples
    samples_per_insert: float = 1.0

    def __post_init__(self) -> None:
        if self.min_size * self.samples_per_insert > self.max_diff:
            raise ValueError(
                f"min_size = {self.min_size} inserts at {self.samples_per_insert:g} samples per insert need room for "
                f"{self.min_size * self.samples_per_insert:g}, but inserts block at {self.max_diff:g}: "
                "nothing could ever be sampled"
            )
        if self.samples_per_insert > self.max_diff:
            raise ValueError(
                f"one insert is {self.samples_per_insert:g} samples, but inserts block at {self.max_diff:g}"
            )

    def may_sample(self, *, inserts: int, samples: int, want: int) -> bool:
        """Whether `want` more samples keep diff >= 0, after the first `min_size` inserts."""
        return inserts >= self.min_size and inserts * self.samples_per_insert - samples >= want

    def may_insert(self, *, inserts: int, samples: int) -> bool:
        """Whether one more insert keeps diff <= max_diff."""
        return (inserts + 1) * self.samples_per_insert - samples <= self.max_diff


def capacity(*, groups_per_step: int, max_lag: int) -> int:
    """Groups that may be alive at once: admission grants no more.

    capacity = (max_lag + 1) * B

    >>> capacity(groups_per_step=16, max_lag=2)
    48
    """
    return (max_lag + 1) * groups_per_step


def idle_slots(slots: int, *, groups_per_step: int, group_size: int, max_lag: int) -> int:
    """Engine slots that admission can never fill, in rollouts.

    >>> idle_slots(64, groups_per_step=8, group_size=4, max_lag=0)
    32
    """
    return max(0, slots - capacity(groups_per_step=groups_per_step, max_lag=max_lag) * group_size)


def explain_idle(slots: int, *, groups_per_step: int, group_size: int, max_lag: int) -> str:
    """What `idle_slots` means and what would fill them; "" when all can be filled.

    >>> print(explain_idle(64, groups_per_step=8, group_size=4, max_lag=0))
    32 of 64 engine slots can never be filled: max_lag = 0 and groups_per_step = 8 admit (0 + 1) * 8 groups * \
group_size 4 = 32 rollouts. max_lag = 1 or groups_per_step = 16 would fill them, or 32 fewer slots.
    """
    idle = idle_slots(slots, groups_per_step=groups_per_step, group_size=group_size, max_lag=max_lag)
    if not idle:
        return ""
    lag = -(-slots // (groups_per_step * group_size)) - 1
    groups = -(-slots // ((max_lag + 1) * group_size))
    return (
        f"{idle} of {slots} engine slots can never be filled: max_lag = {max_lag} and groups_per_step = "
        f"{groups_per_step} admit ({max_lag} + 1) * {groups_per_step} groups * group_size {group_size} = "
        f"{slots - idle} rollouts. max_lag = {lag} or groups_per_step = {groups} would fill them, "
        f"or {idle} fewer slots."
    )
