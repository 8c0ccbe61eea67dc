"""How fast a run goes of late, out of what its components report. Pure, clock given."""

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from millrace.cluster.snapshot import Lag, LearnerNow, Rates
from millrace.core.protocols import QueueStatus
from millrace.learner.report import LearnerStatus, StepReport

WINDOW_S = 30.0  # rates are over the last so many seconds,
WINDOW_STEPS = 4  # and over at least so many steps, however long they take
PACE_STEPS = 50  # that the time left is judged by
CAUSES = ("data", "judge", "weights", "scheduler")  # of waiting
PARTS = {  # of the learner's time -> column of metrics.jsonl
    "computing": "time/compute_s",
    **{cause: f"idle/{cause}_s" for cause in CAUSES},
    "publishing": "time/publish_s",
    "checkpoints": "time/checkpoint_s",
}


def mean_lag(reports: Sequence[StepReport]) -> float:
    """Of the trained tokens, versions."""
    tokens = [(lag, numbers.tokens) for report in reports for lag, numbers in report.numbers.by_lag.items()]
    total = sum(many for _, many in tokens)
    return sum(lag * many for lag, many in tokens) / total if total else 0.0


def columns(report: StepReport) -> dict[str, float]:
    """What a step's time went on, as in metrics.jsonl, seconds."""
    return {
        "time/wait_s": report.wait_s,
        "time/compute_s": report.compute_s,
        "time/publish_s": report.publish_s,
        "time/checkpoint_s": report.checkpoint_s,
        "time/other_s": report.other_s,
        "time/step_s": report.step_s,
        **{f"idle/{cause}_s": report.idle_s.get(cause, 0.0) for cause in CAUSES},
    }


class Spent:
    """What the learner's time went on, out of the rows of metrics.jsonl."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._total_s = 0.0

    def add(self, row: Mapping[str, Any]) -> None:
        """One step."""
        for name, column in PARTS.items():
            self._seconds[name] += row.get(column) or 0.0
        self._total_s += row["time/step_s"]

    @property
    def shares(self) -> dict[str, float]:
        """By name; `other` is whatever no column explains. They sum to 1, or to 0 before the first step."""
        total_s = self._total_s or 1.0
        other_s = max(self._total_s - sum(self._seconds.values()), 0.0)
        return {name: each / total_s for name, each in self._seconds.items()} | {"other": other_s / total_s}


class Gauge:
    """A sliding window over the steps and the engines' counter, from `now_s` and `generated` tokens on."""

    def __init__(self, now_s: float, generated: int, *, steps: int, max_lag: int) -> None:
        self._steps, self._max_lag = steps, max_lag
        self._counters = deque([(now_s, generated)])
        self._reports: deque[tuple[float, StepReport]] = deque()  # when it was seen first
        self._spent = Spent()
        self._paces: deque[float] = deque(maxlen=PACE_STEPS)
        self._first_s: float | None = None  # of the first step, which also waited for the engines

    def begin(self, now_s: float, queue: QueueStatus) -> None:
        """Count from here: what came before was loading."""
        self._counters.clear()
        self._counters.append((now_s, queue.tokens.get("generated", 0)))

    def look(
        self, now_s: float, queue: QueueStatus, learner: LearnerStatus, fresh: Sequence[StepReport]
    ) -> Mapping[str, Any]:
        """What changes in a Status between two looks.

        Args:
            now_s: monotonic.
            fresh: steps made since the last look.
        """
        self._counters.append((now_s, queue.tokens.get("generated", 0)))
        for report in fresh:
            self._reports.append((now_s, report))
            self._spent.add(columns(report))
            if self._first_s is None:
                self._first_s = report.step_s
            else:
                self._paces.append(report.step_s)
        self._forget(now_s)
        (then_s, generated), elapsed_s = self._counters[0], now_s - self._counters[0][0]
        reports = [report for seen_s, report in self._reports if seen_s > then_s]
        idle_s = learner.phase_s if learner.phase == "waiting" else 0.0
        spent_s = sum(report.step_s for report in reports) + idle_s
        return {
            "step": queue.step,
            "committed_step": queue.committed_step,
            "version": queue.newest_version,
            "lag": Lag(mean=mean_lag(reports), max=self._max_lag),
            "draws": dict(queue.states),
            "tokens": dict(queue.tokens),
            "rates": Rates(
                generated_tokens_per_s=_rate(queue.tokens.get("generated", 0) - generated, elapsed_s),
                trained_tokens_per_s=_rate(sum(report.tokens for report in reports), elapsed_s),
                samples_per_s=_rate(sum(report.rollouts for report in reports), elapsed_s),
            ),
            "learner": LearnerNow(
                phase=learner.phase,
                phase_s=learner.phase_s,
                wait_share=_rate(sum(report.wait_s for report in reports) + idle_s, spent_s),
            ),
            "waits": {name: why for name, why in queue.idle.items() if why},
            "idle": self._spent.shares,
            "eta_s": self._eta_s(queue.step),
        }

    def _forget(self, now_s: float) -> None:
        """What is older than the window; of each kind one stays, from which on is counted."""
        if len(self._reports) <= WINDOW_STEPS:
            return
        keep_s = min(now_s - WINDOW_S, self._reports[-WINDOW_STEPS - 1][0])
        while len(self._counters) > 2 and self._counters[1][0] <= keep_s:
            self._counters.popleft()
        while len(self._reports) > WINDOW_STEPS + 1 and self._reports[0][0] <= keep_s:
            self._reports.popleft()

    def _eta_s(self, step: int) -> float | None:
        if self._first_s is None:
            return None
        pace_s = sum(self._paces) / len(self._paces) if self._paces else self._first_s
        return (self._steps - step) * pace_s


def _rate(many: float, seconds: float) -> float:
    return many / seconds if seconds > 0 else 0.0


class Waits:
    """What share of the time each worker waited for the queue, by cause, as often as it was looked at.

    >>> waits = Waits(); waits.shares(["reward-0"])
    {'reward-0': {}}
    """

    def __init__(self) -> None:
        self._found: Counter[tuple[str, str]] = Counter()  # worker, cause -> looks
        self._looks = 0

    def note(self, status: QueueStatus) -> None:
        """One look at the queue."""
        self._looks += 1
        self._found.update((name, status.idle_causes.get(name, "other")) for name, why in status.idle.items() if why)

    def shares(self, workers: Iterable[str]) -> dict[str, dict[str, float]]:
        """Worker -> cause -> share of the looks."""
        shares: dict[str, dict[str, float]] = {name: {} for name in workers}
        for (name, cause), looks in self._found.items():
            if name in shares:
                shares[name][cause] = looks / self._looks
        return shares
