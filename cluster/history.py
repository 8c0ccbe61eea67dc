"""What a run has done so far: its steps, evaluations and events, collected from components that may come and go."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from millrace.actors.evaluation import Evaluation
from millrace.cluster.progress import shown
from millrace.cluster.record import Recorder, plain
from millrace.cluster.result import Row, evaluated, row
from millrace.cluster.samples import RolloutLog
from millrace.core.protocols import Quarantined, QueueStatus
from millrace.core.replay.draws import CRASHES, JUDGE_CRASHED
from millrace.learner.report import StepReport


class History:
    """Of the surviving history: what a restarted learner makes again replaces what was recorded of it.

    Args:
        rollouts: where sampled rollouts go.
        say: receives lines for a person.
    """

    def __init__(self, record: Recorder, rollouts: RolloutLog, *, say: Callable[[str], None]) -> None:
        self._record, self._rollouts, self._say = record, rollouts, say
        self._reports = self._events = self._evaluations = 0  # collected of the present incarnations
        self._quarantined = 0
        self._blamed: list[str] = []
        self._damage: set[str] = set()
        self._versions: dict[int, int] = {}  # step -> published after it
        self.rows: list[Row] = []  # of all steps, those of earlier incarnations first
        self.held_out: list[dict[str, Any]] = []  # and of all evaluations
        self.resumed_at = 0

    def look_back(self, status: QueueStatus) -> None:
        """Go on from what earlier incarnations of the run recorded, as far as it is committed."""
        self._rewind(status.committed_step)
        self.resumed_at = len(self.rows)
        self._quarantined = status.quarantined

    def lost(self, component: str) -> None:
        """A component is made anew, and counts from zero."""
        if component == "learner":
            self._reports = self._events = 0
        elif component == "held-out":
            self._evaluations = 0

    async def collect(
        self, learner: Any, held_out: Any | None, queue: Any, status: QueueStatus
    ) -> Sequence[StepReport]:
        """Fetch and record what is new. Returns the reports of the steps, without their rollouts.

        Args:
            status: of the queue, now.
        """
        for event in await learner.events(after=self._events):
            self._events += 1
            self._record.event(**event)
            self._say(said(event))
        reports: list[StepReport] = list(await learner.reports(after=self._reports))
        self._reports += len(reports)
        for report in reports:
            self._made(report, status.tokens)
        if held_out is not None:
            for evaluation in await held_out.results(after=self._evaluations):
                self._evaluations += 1
                self._evaluated(evaluation)
        if status.quarantined > self._quarantined:
            for each in await queue.quarantined(after=self._quarantined):
                self._quarantined += 1
                self._gave_up(each)
        return [replace(report, samples=()) for report in reports]

    async def tell_damage(self, queue: Any) -> None:
        """What the journal found missing or broken."""
        for line in await queue.damage():
            if line not in self._damage:
                self._damage.add(line)
                self._record.event("damaged", what=line)
                self._say(line)

    def blamed(self) -> list[str]:
        """Workers whose losses turned out to be a prompt's fault, each as often, since the last call."""
        found, self._blamed = self._blamed, []
        return found

    def _rewind(self, step: int) -> None:
        kept = self._record.rewind(step)
        self._rollouts.rewind(step)
        self.rows = [each for each in kept if "held_out" not in each]
        self._versions = {each["step"]: each["version"] for each in self.rows}
        self.held_out = [each["held_out"] for each in kept if "held_out" in each]

    def _made(self, report: StepReport, tokens: Mapping[str, int]) -> None:
        if self._versions.get(report.step) == report.version:
            return  # of a checkpoint that the learner was restored from
        if self.rows and self.rows[-1]["step"] >= report.step:
            self._rewind(report.step - 1)
        self._rollouts.write(report.samples)
        self._versions[report.step] = report.version
        self.rows.append({"step": report.step, **plain(row(report, tokens=tokens))})
        self._record.metrics(report.step, self.rows[-1])

    def _evaluated(self, evaluation: Evaluation) -> None:
        facts = plain(evaluated(evaluation))
        if any(each["step"] == evaluation.step for each in self.held_out):
            return  # of weights that were evaluated before the run, or the learner, was resumed from them
        self.held_out.append(facts)
        self._record.metrics(evaluation.step, {"held_out/mean": evaluation.mean, "held_out": facts})
        self._record.event("evaluated", **facts)
        if evaluation.step == 0:
            self._say(f"held-out before training: {shown(evaluation.mean)}")

    def _gave_up(self, each: Quarantined) -> None:
        facts = plain({name: getattr(each, name) for name in each.__slots__})
        self._record.event("quarantined", **facts)
        if each.cause in (*CRASHES, JUDGE_CRASHED):
            self._blamed += each.workers
        self._say(
            f"draw {each.draw} of prompt {each.prompt!r} was given up: {each.cause}, {each.times} times; the run goes "
            "on without it, events.jsonl has its traceback"
        )


def said(event: Mapping[str, Any]) -> str:
    """An event of the learner in a line.

    >>> said({"kind": "step skipped", "step": 3, "why": "the loss is nan"})
    'step skipped: step 3; why the loss is nan'
    """
    facts = "; ".join(f"{name} {value}" for name, value in event.items() if name != "kind")
    return f"{event['kind']}: {facts}"
