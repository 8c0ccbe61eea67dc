"""What the learner's time goes on."""

from collections.abc import Mapping

from millrace.core.protocols import IDLE, Clock

SPENT = ("waiting", "computing", "publishing", "committing")  # the phases of a step


class Phases:
    """The phase the learner is in, since when, and how long each phase of the present step took.

    >>> now = iter([0.0, 1.0, 3.0, 6.0])
    >>> phases = Phases(lambda: next(now))
    >>> phases.begin(); phases.enter("computing"); phases.enter("publishing")
    >>> phases.spent["waiting"], phases.spent["computing"]
    (2.0, 3.0)
    """

    def __init__(self, clock: Clock) -> None:
        """Args: clock: monotonic seconds."""
        self._clock = clock
        self.now, self.since_s = "loading", clock()
        self.began_s = self.since_s
        self.spent: dict[str, float] = {}

    def begin(self) -> None:
        """A step begins: with waiting for its batch."""
        self.now, self.began_s = "waiting", self._clock()
        self.since_s = self.began_s
        self.spent = dict.fromkeys(SPENT, 0.0)

    def enter(self, phase: str) -> None:
        """The time since the last change was spent on the phase that ends now."""
        now_s = self._clock()
        if self.now in self.spent:
            self.spent[self.now] += now_s - self.since_s
        self.now, self.since_s = phase, now_s

    @property
    def lasts_s(self) -> float:
        """Of the present phase, so far."""
        return self._clock() - self.since_s

    @property
    def step_s(self) -> float:
        """Of the present step, so far."""
        return self._clock() - self.began_s


def idle(wait_s: float, told_s: Mapping[str, float]) -> dict[str, float]:
    """The learner's waiting by cause; adds up to `wait_s`.

    Args:
        wait_s: as the learner measured it.
        told_s: as the queue accounts for it; what it does not account for is the scheduler's, or the way there.

    >>> idle(3.0, {"data": 2.0})
    {'data': 2.0, 'judge': 0.0, 'weights': 0.0, 'scheduler': 1.0}
    >>> idle(1.0, {"data": 1.5, "judge": 0.5})
    {'data': 0.75, 'judge': 0.25, 'weights': 0.0, 'scheduler': 0.0}
    """
    known = {cause: max(0.0, told_s.get(cause, 0.0)) for cause in IDLE}
    total = sum(known.values())
    if total > wait_s:
        return {cause: wait_s * told / total for cause, told in known.items()}
    return {**known, "scheduler": known["scheduler"] + wait_s - total}
