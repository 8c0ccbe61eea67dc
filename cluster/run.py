"""One run, from a plan to its result: start the line, watch it, record it, end it."""

import asyncio
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from millrace.actors.evaluation import Evaluation
from millrace.cluster.gauge import Gauge
from millrace.cluster.lengths import trained_by_length
from millrace.cluster.plan import Plan
from millrace.cluster.progress import line as progress_line
from millrace.cluster.progress import shown
from millrace.cluster.record import Recorder, plain
from millrace.cluster.result import Row, evaluated, result, row
from millrace.cluster.run_directory import RESULT
from millrace.cluster.samples import RolloutLog
from millrace.cluster.snapshot import Score, Snapshot
from millrace.cluster.spawn import Spawn
from millrace.cluster.trackers import tracked
from millrace.cluster.wiring import Line, wire
from millrace.core.errors import DeadlineError, MillraceError, boundary
from millrace.core.protocols import QueueStatus
from millrace.learner.model import load_tokenizer
from millrace.learner.report import StepReport

POLL_S = 1.0
LINE_S = 5.0  # between two progress lines
CLOSE_S = 20.0  # for an engine to end
LEAVE_S = 5.0  # for workers to see what is in hand through, and leave, when the run was stopped


class Run:
    """Runs a plan once. Call `execute`; `stop` from anywhere in the same loop ends it in order."""

    def __init__(
        self,
        plan: Plan,
        *,
        spawn: Spawn,
        resume: bool,
        say: Callable[[str], None],
        snapshot: Snapshot | None = None,
    ) -> None:
        config = plan.config
        self._plan = plan
        self._snapshot = snapshot or Snapshot(config.directory, name=config.name, steps=config.loop.steps)
        self._resume = resume
        self._spawn = spawn
        self._say = say
        self._rollouts = RolloutLog(config.directory, partial(load_tokenizer, config.model))
        self._reports: list[StepReport] = []  # without their samples, which are on the disk
        self._evaluations: list[Evaluation] = []
        self._rows: list[Row] = []  # of all steps in the surviving history, those of earlier incarnations first
        self._held_out: list[dict[str, Any]] = []  # and of all evaluations
        self._resumed_at = 0
        self._generated, self._version = 0, -1  # tokens and newest weights, of earlier incarnations
        self._tokens: Mapping[str, int] = {}  # the waste ledger at the last look
        self._waiting: Counter[str] = Counter()
        self._polls = 0
        self._stopped = asyncio.Event()
        self._line: Line | None = None
        self._gauge: Gauge | None = None

    async def execute(self) -> Mapping[str, Any]:
        """Run to the end.

        Returns:
            What result.json holds.
        Raises:
            MillraceError: a component failed; the message names it and the cause.
        """
        config = self._plan.config
        with Recorder(config.directory) as record:
            told = tracked(
                config.tracking,
                config.model_dump(mode="json"),
                record=record,
                snapshot=self._snapshot,
                say=self._say,
            )
            try:
                async with told:
                    return await self._recorded(record)
            except MillraceError as caught:
                record.event("failed", cause=str(caught))
                raise
            except asyncio.CancelledError:
                record.event("interrupted")
                raise

    async def _recorded(self, record: Recorder) -> Mapping[str, Any]:
        line = self._line = wire(self._plan, self._spawn)
        if self._resume:
            await self._look_back(line, record)
        if self._stopped.is_set():
            await line.learner.stop()
        components = {"learner": line.learner, **line.workers}
        if line.held_out is not None:
            components["held-out"] = line.held_out
        tasks = {name: asyncio.ensure_future(_attributed(name, each)) for name, each in components.items()}
        self._say("starting the learner, the engines and the judges")
        record.event("resumed" if self._resume else "started", step=self._resumed_at, components=sorted(tasks))
        try:
            await self._watch(line, tasks, record)
            await self._end(line, tasks, record)
        finally:
            for task in tasks.values():
                task.cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)
            with suppress(MillraceError), boundary("collecting"):  # the last steps of a run that fails are kept, too
                await self._collect(line, record)
        found = await self._conclude(line, record)
        await self._close(line)
        return found

    async def _close(self, line: Line) -> None:
        """Let engines end in order: one that has processes of its own leaves shared memory behind otherwise."""
        for name, each in line.engines.items():
            try:
                with boundary(f"closing {name}"):
                    await asyncio.wait_for(each.close(), CLOSE_S)
            except MillraceError as caught:
                self._say(f"{caught}; its process is ended all the same")

    async def _look_back(self, line: Line, record: Recorder) -> None:
        """Go on from what earlier incarnations recorded, as far as it is committed."""
        status: QueueStatus = await line.queue.status()
        kept = record.rewind(status.committed_step)
        self._rollouts.rewind(status.committed_step)
        self._rows = [each for each in kept if "held_out" not in each]
        self._held_out = [each["held_out"] for each in kept if "held_out" in each]
        self._resumed_at = len(self._rows)
        self._generated, self._version = status.tokens.get("generated", 0), status.newest_version

    async def stop(self) -> None:
        """Finish the step under way, commit it, and end the run."""
        self._stopped.set()
        self._snapshot.update(state="stopping")
        if self._line is not None:
            await self._line.learner.stop()

    async def _watch(self, line: Line, tasks: Mapping[str, asyncio.Future[None]], record: Recorder) -> None:
        """Record what happens until the learner is done."""
        began = last_step = last_line = time.monotonic()
        loop = self._plan.config.loop
        gauge = Gauge(began, self._generated, steps=loop.steps, max_lag=loop.max_lag)
        while True:
            running = [task for task in tasks.values() if not task.done()]
            await asyncio.wait(running, timeout=POLL_S, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks.values():
                if task.done():
                    task.result()  # raises what the component raised
            with boundary("watching the queue"):
                status: QueueStatus = await line.queue.status()
            now = time.monotonic()
            if self._gauge is None:
                if status.newest_version <= self._version:
                    self._snapshot.update()
                    gauge.begin(now, status)
                    self._refuse_a_stall(now - began, status)
                    continue
                began = last_step = last_line = now
                self._gauge = gauge
                self._say("learner is ready; waiting for the first rollouts")
            self._polls += 1
            self._waiting.update(name for name, why in status.idle.items() if why)
            fresh = await self._look(line, record, status)
            last_step = now if fresh else last_step
            if tasks["learner"].done():
                return
            self._refuse_a_stall(now - last_step, status)
            if now - last_line >= LINE_S and self._reports:
                last_line = now
                self._say(progress_line(self._snapshot.status))

    async def _look(self, line: Line, record: Recorder, status: QueueStatus) -> list[StepReport]:
        """Collect what is new, and tell it in status.json."""
        self._tokens = status.tokens
        with boundary("collecting what the learner and the evaluation report"):
            fresh = await self._collect(line, record)
            learner = await line.learner.status()
            await line.store.held()  # a dead store is noticed here first
        assert self._gauge is not None
        newest = max(self._held_out, key=lambda each: int(each["step"]), default=None)
        self._snapshot.update(
            state="stopping" if self._stopped.is_set() else "running",
            reward=self._rows[-1]["reward/mean"] if self._rows else None,
            held_out=None if newest is None else Score(step=newest["step"], mean=newest["mean"]),
            **plain(self._gauge.look(time.monotonic(), status, learner, fresh)),
        )
        return fresh

    def _refuse_a_stall(self, silent_s: float, status: QueueStatus) -> None:
        limit_s = self._plan.config.stall_s
        if silent_s <= limit_s:
            return
        idle = "; ".join(f"{name}: {why}" for name, why in status.idle.items()) or "nobody says that it waits"
        raise DeadlineError(
            f"step {status.step} did not end in {silent_s:.0f} s (stall_s = {limit_s:g}). Draws: "
            f"{ {state: many for state, many in status.states.items() if many} }. {idle}. "
            "Raise stall_s if a step may take so long, or look at what they wait for"
        )

    async def _collect(self, line: Line, record: Recorder) -> list[StepReport]:
        """Fetch and record the steps and evaluations since the last time."""
        fresh: list[StepReport] = list(await line.learner.reports(after=len(self._reports)))
        self._rollouts.write([sample for report in fresh for sample in report.samples])
        reports = [replace(report, samples=()) for report in fresh]
        self._reports += reports
        for report in reports:
            self._rows.append(plain(row(report, tokens=self._tokens)))
            record.metrics(report.step, self._rows[-1])
        if line.held_out is not None:
            for evaluation in await line.held_out.results(after=len(self._evaluations)):
                self._evaluations.append(evaluation)
                facts = plain(evaluated(evaluation))
                if any(each["step"] == evaluation.step for each in self._held_out):
                    continue  # of the weights that the run resumed from, and evaluated before it ended
                self._held_out.append(facts)
                record.metrics(evaluation.step, {"held_out/mean": evaluation.mean, "held_out": facts})
                record.event("evaluated", **facts)
                if evaluation.step == 0:
                    self._say(f"held-out before training: {shown(evaluation.mean)}")
        return reports

    async def _end(self, line: Line, tasks: Mapping[str, asyncio.Future[None]], record: Recorder) -> None:
        """The learner is done: let the others finish what they have, and leave."""
        await line.queue.finish()
        if line.held_out is not None:
            await line.held_out.finish()
        others = {name: task for name, task in tasks.items() if name != "learner"}
        late, began = set(others.values()), time.monotonic()
        while late:
            # Who stops a run does not wait; otherwise the last evaluation may take its time.
            limit_s = LEAVE_S if self._stopped.is_set() else self._plan.config.stall_s
            if time.monotonic() - began > limit_s:
                names = ", ".join(name for name, task in others.items() if task in late)
                self._say(f"{names} did not leave within {limit_s:g} s and will be ended")
                return
            done, late = await asyncio.wait(late, timeout=POLL_S, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            await self._look(line, record, await line.queue.status())

    async def _conclude(self, line: Line, record: Recorder) -> Mapping[str, Any]:
        """Write result.json and model/."""
        directory = self._plan.config.directory
        status = await line.queue.status()
        await self._look(line, record, status)
        checkpoint: str | None = await line.learner.checkpoint()
        if checkpoint is not None:
            export(Path(checkpoint), directory / "model")
        failures = await self._judge_failures(line, record, dead=status.states.get("dead", 0))
        found = plain(
            result(
                self._plan,
                judge_failures=failures,
                ended="finished" if status.step >= self._plan.config.loop.steps else "stopped",
                rows=self._rows,
                resumed_at=self._resumed_at,
                evaluations=sorted(self._held_out, key=lambda each: int(each["step"])),
                status=status,
                idle_workers={name: self._waiting[name] / max(self._polls, 1) for name in line.workers},
                checkpoint=checkpoint,
                by_length=trained_by_length(directory / "ledger.jsonl", steps=status.step),
            )
        )
        (directory / RESULT).write_text(json.dumps(found, indent=2) + "\n")
        record.event(found["ended"], step=found["steps"])
        self._snapshot.update(state=found["ended"], eta_s=None, waits={})
        return dict(found)

    async def _judge_failures(self, line: Line, record: Recorder, *, dead: int) -> Mapping[str, Any] | None:
        """Verdicts that failed, and the first one's cause; None where all were given."""
        with boundary("asking the reward workers"):
            said = [await worker.status() for name, worker in line.workers.items() if name.startswith("reward-")]
        many = sum(each["verdicts"]["judge_failed"] for each in said)
        if not many:
            return None
        first = next(each["first_failure"] for each in said if each["first_failure"])
        record.event("judge failures", verdicts=many, given_up_draws=dead, first=first)
        self._say(f"{many} verdicts failed and {dead} draws were given up; the first: {first.splitlines()[0]}")
        return {"verdicts": many, "first": first}


async def _attributed(name: str, component: Any) -> None:
    with boundary(name):
        await component.run()


def export(checkpoint: Path, directory: Path) -> None:
    """The model of a checkpoint, without what only the learner needs."""
    if directory.exists():
        shutil.rmtree(directory)
    private = {"learner", "files.json"}
    shutil.copytree(checkpoint, directory, ignore=lambda _, names: private.intersection(names))
