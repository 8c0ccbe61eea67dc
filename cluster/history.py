"""What a run has done so far: its steps, evaluations and events, collected from components that may come and go."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
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

PATIENCE_S = 2.0  # a component that is stopped, or still loads, answers nothing

KEPT = {"step", "version", "reward/mean", "reward/invalid_rollouts", "rollout/count", "lag_0/max_gap"}


class History:
    """Of the surviving history: what a restarted learner makes again replaces what was recorded of it.

    Args:
        rollouts: where sampled rollouts go.
        say: receives lines for a person.
    """

    def __init__(self, record: Recorder, rollouts: RolloutLog, *, say: Callable[[str], None]) -> None:
        self._record, self._rollouts, self._say = record, rollouts, say
        self._reports = self._events = self._evaluations = 0  # collected of the present incarnations
        self._quarantined = self._lives = 0
        self._blamed: list[str] = []
        self._damage: set[str] = set()
        self._full = ""  # what the journal lacks
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
        self._lives += 1
        if component == "learner":
            self._reports = self._events = 0
        elif component == "held-out":
            self._evaluations = 0

    async def collect(
        self, learner: Any, held_out: Any | None, queue: Any, status: QueueStatus, *, patience_s: float = PATIENCE_S
    ) -> Sequence[StepReport]:
        """Fetch and record what is new. Returns the reports of the steps, without their rollouts.

        Args:
            status: of the queue, now.
            patience_s: for each of them; what does not answer is asked again the next time.
        """
        fresh: list[StepReport] = []
        parts = [self._of_learner(learner, status, fresh), self._of_queue(queue, status)]
        for part in [*parts, self._of_held_out(held_out)] if held_out is not None else parts:
            with suppress(ConnectionError, TimeoutError):  # it is made anew, or hangs: the others go on
                await asyncio.wait_for(part, patience_s)
        return fresh

    async def _of_learner(self, learner: Any, status: QueueStatus, fresh: list[StepReport]) -> None:
        life = self._lives
        for event in await learner.events(after=self._events):
            self._events += 1
            self._record.event(**event)
            self._say(said(event))
        reports: Sequence[StepReport] = await learner.reports(after=self._reports)
        if life != self._lives:
            return  # the last words of one that was lost: the next one repeats what stays of them
        for report in reports:
            self._reports += 1
            self._made(report, status.tokens)
            fresh.append(replace(report, samples=()))

    async def _of_held_out(self, held_out: Any) -> None:
        life = self._lives
        for evaluation in await held_out.results(after=self._evaluations):
            self._evaluations += life == self._lives
            self._evaluated(evaluation)

    async def _of_queue(self, queue: Any, status: QueueStatus) -> None:
        if (full := status.idle.get("queue", "")) and not self._full:
            self._record.event("disk full", why=full)
            self._say(f"{full}. Until then the run waits")
        elif self._full and not full:
            self._record.event("disk has room")
            self._say("the journal finds room on its disk again: the run goes on")
        self._full = full
        if status.quarantined > self._quarantined:
            for each in await queue.quarantined(after=self._quarantined):
                self._quarantined += 1
                self._gave_up(each)

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
        self.rows = [slim(each) for each in kept if "held_out" not in each]
        self._versions = {each["step"]: each["version"] for each in self.rows}
        self.held_out = [each["held_out"] for each in kept if "held_out" in each]

    def _made(self, report: StepReport, tokens: Mapping[str, int]) -> None:
        if self._versions.get(report.step) == report.version:
            return  # of a checkpoint that the learner was restored from
        if self.rows and self.rows[-1]["step"] >= report.step:
            self._rewind(report.step - 1)
        self._rollouts.write(report.samples)
        self._versions[report.step] = report.version
        numbers = {"step": report.step, **plain(row(report, tokens=tokens))}
        self.rows.append(slim(numbers))
        self._record.metrics(report.step, numbers)

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


def slim(row: Row) -> Row:
    """What the end of a run needs of a step's row: the others are on the disk alone.

    >>> slim({"step": 1, "time/step_s": 0.5, "objective/clip_fraction": 0.1})
    {'step': 1, 'time/step_s': 0.5}
    """
    return {name: value for name, value in row.items() if name in KEPT or name.startswith(("time/", "idle/"))}


def said(event: Mapping[str, Any]) -> str:
    """An event of the learner in a line.

    >>> said({"kind": "step skipped", "step": 3, "why": "the loss is nan"})
    'step skipped: step 3; why the loss is nan'
    """
    facts = "; ".join(f"{name} {value}" for name, value in event.items() if name != "kind")
    return f"{event['kind']}: {facts}"
