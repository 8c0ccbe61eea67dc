"""What a person reads while a run goes on: one plain line now and then."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite

from millrace.actors.evaluation import Evaluation
from millrace.core.protocols import QueueStatus
from millrace.core.replay.config import QueueConfig
from millrace.learner.report import StepReport


def duration(seconds: float) -> str:
    """Hours, minutes and seconds.

    >>> duration(61.5), duration(3700)
    ('1:01', '1:01:40')
    """
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def count(number: float) -> str:
    """A number in at most four characters or so.

    >>> count(950), count(12_345), count(3_400_000)
    ('950', '12.3k', '3.4M')
    """
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.1f}{unit}"
    return f"{number:.0f}"


def shown(mean: float) -> str:
    """A mean reward; there is none where every judgement failed.

    >>> shown(0.5), shown(float("nan"))
    ('0.500', 'no score')
    """
    return f"{mean:.3f}" if isfinite(mean) else "no score"


def mean_lag(reports: Sequence[StepReport]) -> float:
    """Of the trained tokens, versions."""
    tokens = [(lag, numbers.tokens) for report in reports for lag, numbers in report.numbers.by_lag.items()]
    total = sum(many for _, many in tokens)
    return sum(lag * many for lag, many in tokens) / total if total else 0.0


@dataclass
class Meter:
    """Rates between two lines."""

    time_s: float
    generated: int = 0
    reports: list[StepReport] = field(default_factory=list)

    def line(
        self, loop: QueueConfig, *, now_s: float, status: QueueStatus, evaluation: Evaluation | None, eta_s: float
    ) -> str:
        """The progress since the last line; starts counting anew."""
        reports, elapsed_s = self.reports, max(now_s - self.time_s, 1e-9)
        generated = status.tokens.get("generated", 0)
        parts = [f"step {status.step:>{len(str(loop.steps))}}/{loop.steps}"]
        if reports:
            parts.append(f"reward {sum(r.reward for r in reports) / len(reports):.3f}")
        if evaluation is not None:
            parts.append(f"held-out {shown(evaluation.mean)} @{evaluation.step}")
        parts.append(f"lag {mean_lag(reports):.1f} of {loop.max_lag}")
        parts.append(f"generate {count((generated - self.generated) / elapsed_s)} tok/s")
        parts.append(f"learn {count(sum(r.tokens for r in reports) / elapsed_s)} tok/s")
        parts.append(waits(status, sum(r.wait_s for r in reports) / elapsed_s))
        parts.append(f"eta {duration(eta_s)}")
        self.time_s, self.generated, self.reports = now_s, generated, []
        return "  ".join(part for part in parts if part)


def waits(status: QueueStatus, learner_share: float) -> str:
    """Who waits for whom, in few words."""
    said = [f"learner waits {min(learner_share, 1):.0%}"]
    idle: Mapping[str, str] = {name: why for name, why in status.idle.items() if name.startswith("generation") and why}
    if idle:
        name, why = next(iter(idle.items()))
        said.append(f"{name if len(idle) == 1 else f'{len(idle)} engines'} wait: {_short(why)}")
    return ", ".join(said)


def _short(why: str) -> str:
    text = why.split(";")[0].split(". ")[0].split(":")[0]
    return text if len(text) <= 60 else text[:57] + "..."
