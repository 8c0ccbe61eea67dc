"""When a component counts as lost, and whether it is started again. Pure: time is an argument."""

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from millrace.cluster.supervise.config import SuperviseConfig

LAZY = 0.02  # a process that uses a smaller share of a core than this does not compute
OWN_ERROR = 5  # restarts that an error counts which the component raised itself


class Vital(NamedTuple):
    """What the system says of a process."""

    stopped: bool  # by SIGSTOP or a debugger
    cpu_s: float  # used so far, all its threads


@dataclass
class Watch:
    """One incarnation of a component, from its start on.

    >>> watch = Watch(SuperviseConfig(hang_s=8), began=0.0)
    >>> watch.answered(10.0); watch.look(12.0, Vital(True, 3.0)); watch.verdict(12.0)
    ''
    >>> watch.look(18.5, Vital(True, 3.0)); watch.verdict(18.5)
    'its process is stopped (SIGSTOP) and has not answered for 8.5 s'
    """

    config: SuperviseConfig
    began: float
    last: float | None = None  # answer
    seen: Vital | None = None
    since: tuple[float, float] | None = None  # when it was first seen after its last answer, and its cpu_s then

    def answered(self, now: float) -> None:
        """It answered a ping."""
        self.last, self.since, self.seen = now, None, None

    def look(self, now: float, vital: Vital | None) -> None:
        """What its process was seen to do while it did not answer; None where there is no such process."""
        self.seen = vital
        if vital is not None and self.since is None:
            self.since = (now, vital.cpu_s)

    def silent_s(self, now: float) -> float:
        """Since its last answer, or its start."""
        return now - (self.began if self.last is None else self.last)

    def verdict(self, now: float) -> str:
        """Why it must be ended; "" while it need not be."""
        silent_s, config = self.silent_s(now), self.config
        if self.last is None:
            if silent_s > config.start_s:
                return f"it has not answered once in {silent_s:.0f} s (supervise.start_s = {config.start_s:g})"
            return ""
        if silent_s <= config.hang_s:
            return ""
        if self.seen is None or self.since is None:
            if silent_s > config.busy_s:
                return f"no answer for {silent_s:.0f} s (supervise.busy_s), and nobody there can see its process"
            return ""
        if self.seen.stopped:
            return f"its process is stopped (SIGSTOP) and has not answered for {silent_s:.1f} s"
        watched_s, used_s = now - self.since[0], self.seen.cpu_s - self.since[1]
        if watched_s >= config.hang_s / 2 and used_s <= LAZY * watched_s:
            return f"it hangs: no answer for {silent_s:.1f} s, and its process does not compute"
        if silent_s > config.busy_s:
            return f"it computes, but has not answered for {silent_s:.0f} s (supervise.busy_s = {config.busy_s:g})"
        return ""


@dataclass
class Budget:
    """How often one component may be lost.

    >>> budget = Budget(SuperviseConfig(restarts=2, backoff_s=1, window_s=100))
    >>> budget.spend(0.0), budget.spend(5.0), budget.spend(6.0), budget.spend(101.0)
    (1.0, 2.0, None, 2.0)
    """

    config: SuperviseConfig
    losses: deque[tuple[float, int]] = field(default_factory=deque)  # when, how many it counts

    def spend(self, now: float, *, count: int = 1) -> float | None:
        """Seconds to wait before the restart; None when there is none left. What is refused is not counted."""
        while self.losses and self.losses[0][0] <= now - self.config.window_s:
            self.losses.popleft()
        if self.spent + count > self.config.restarts:
            return None
        self.losses.append((now, count))
        wait_s = self.config.backoff_s * 2.0 ** min(len(self.losses) - 1, 100)
        return min(wait_s, self.config.backoff_most_s)

    def refund(self, losses: int) -> None:
        """The last losses were a prompt's fault."""
        for _ in range(min(losses, len(self.losses))):
            self.losses.pop()

    @property
    def spent(self) -> int:
        """Of the present window."""
        return sum(count for _, count in self.losses)
