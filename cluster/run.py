"""One run, from a plan to its result: start the line, keep it in being, watch it, record it, end it."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from millrace.cluster import incidents
from millrace.cluster.conclude import conclude, judge_failures
from millrace.cluster.gauge import Gauge, Waits
from millrace.cluster.history import PATIENCE_S, History
from millrace.cluster.plan import Plan
from millrace.cluster.progress import line as progress_line
from millrace.cluster.record import Recorder, plain
from millrace.cluster.run_directory import EVENTS
from millrace.cluster.samples import RolloutLog
from millrace.cluster.snapshot import ComponentNow, Score, Snapshot, cut_short
from millrace.cluster.spawn import InProcess, Spawn
from millrace.cluster.supervise.supervisor import Supervisor
from millrace.cluster.trackers import tracked
from millrace.cluster.wiring import Line, wire
from millrace.core.calls import persist
from millrace.core.errors import ComponentLost, DeadlineError, MillraceError, boundary
from millrace.core.protocols import QueueStatus
from millrace.learner.report import LearnerStatus
from millrace.learner.tokenizer import load_tokenizer

T = TypeVar("T")

POLL_S = 1.0
LINE_S = 5.0  # between two progress lines
CLOSE_S = 20.0  # for an engine to end
# When the run was stopped; together they leave time for Ray to end within ten seconds.
STOP_S = 3.5  # for the learner to finish its step and commit it
LEAVE_S = 1.5  # for workers to put what is finished, and leave
SOON_S = 0.5  # for an engine to end


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
        self._generated, self._version = 0, -1  # tokens and newest weights, of earlier incarnations
        self._waits = Waits()
        self._queue: QueueStatus | None = None  # its last status
        self._stopped_at: float | None = None
        self._without_checkpoint = False
        self._learner: LearnerStatus | None = None  # the last that it said
        self._supervisor: Supervisor | None = None
        self._gauge: Gauge | None = None

    async def execute(self) -> Mapping[str, Any]:
        """Run to the end.

        Returns:
            What result.json holds.
        Raises:
            MillraceError: a component failed for good; the message names it and the cause.
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
            except DeadlineError as caught:
                record.event("failed" if self._stopped_at is None else "interrupted", cause=str(caught))
                if self._stopped_at is None:
                    raise
                raise asyncio.CancelledError from caught  # who stops a run does not wait for what is down
            except MillraceError as caught:
                record.event("failed", cause=str(caught))
                raise
            except asyncio.CancelledError:
                record.event("interrupted")
                raise

    async def _recorded(self, record: Recorder) -> Mapping[str, Any]:
        self._line = wire(self._plan, self._spawn)
        try:
            return await self._wired(self._line, record)
        finally:  # the ledger's files are whole then, and can be opened
            with suppress(MillraceError, TimeoutError), boundary("closing the queue"):
                await asyncio.wait_for(self._line.queue.close(), SOON_S)

    async def _wired(self, line: Line, record: Recorder) -> Mapping[str, Any]:
        directory = self._plan.config.directory
        samples = RolloutLog(directory, partial(load_tokenizer, self._plan.config.model))
        self._history = History(record, samples, say=self._say)
        if self._resume:  # before anybody makes new versions
            before = await self._status()
            self._history.look_back(before)
            self._generated, self._version = before.tokens.get("generated", 0), before.newest_version
        supervisor = self._supervisor = self._supervised(line, record)
        supervisor.remember(incidents.incidents(incidents.read(directory / EVENTS)))
        tasks = supervisor.start(later=self._later())  # they wait for the queue themselves, once they have loaded
        if self._stopped_at is not None:
            self._tell_learner_to_stop()
        self._say("starting the learner, the engines and the judges")
        try:
            status = await self._status()
            await self._history.tell_damage(line.queue)
            facts = {"step": status.committed_step, "components": sorted(supervisor.names)}
            record.event("resumed" if self._resume else "started", **facts)
            await self._watch(tasks, record)
            await self._end(tasks, record)
        finally:
            for task in tasks.values():
                task.cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)
            with suppress(MillraceError, TimeoutError):  # the last steps of a run that fails are kept, too
                async with asyncio.timeout(SOON_S):
                    await self._status()
                    await self._collect()
            self._see()
        found = await self._conclude(record)
        await self._close()
        return found

    def _later(self) -> list[str]:
        """What starts when a step is made: the first one does not wait for processor time that it takes."""
        shares_cores = not self._plan.config.evaluation.gpus and not isinstance(self._spawn, InProcess)
        return ["held-out"] if shares_cores and self._plan.held_out else []

    def _supervised(self, line: Line, record: Recorder) -> Supervisor:
        supervisor = Supervisor(
            self._plan.config.supervise,
            spawn=self._spawn,
            queue=line.queue,
            lasting={"queue": line.queue, "weights": line.store},
            makers=line.makers,
            tell=record.event,
            say=self._say,
            lost=self._lost,
        )
        supervisor.ending = lambda name: self._stopped_at is not None and name != "queue"
        return supervisor

    async def _lost(self, component: str) -> None:
        self._history.lost(component)

    async def _close(self) -> None:
        """Let engines end in order: one that has processes of its own leaves shared memory behind otherwise."""
        limit_s = CLOSE_S if self._stopped_at is None else SOON_S
        assert self._supervisor is not None
        made = [name for name in self._line.engines if self._supervisor[name] is not None]
        await asyncio.gather(*(self._closed(name, limit_s) for name in made))

    async def _closed(self, name: str, limit_s: float) -> None:
        assert self._supervisor is not None
        try:
            with boundary(f"closing {name}"), suppress(TimeoutError):  # its process is ended all the same
                await asyncio.wait_for(self._supervisor[name].close(), limit_s)
        except MillraceError as caught:
            self._say(f"{caught}; its process is ended all the same")

    async def stop(self) -> None:
        """Finish the step under way, commit it, and end the run. What does not come in time is not waited for."""
        if self._stopped_at is None:
            self._stopped_at = time.monotonic()
        self._snapshot.update(state="stopping")
        self._tell_learner_to_stop()

    def _tell_learner_to_stop(self) -> None:
        async def told() -> None:
            with suppress(MillraceError), boundary("stopping the learner"):
                assert self._supervisor is not None
                await self._supervisor["learner"].stop()

        if self._supervisor is not None:
            self._telling = asyncio.ensure_future(told())

    async def _watch(self, tasks: Mapping[str, asyncio.Future[None]], record: Recorder) -> None:
        """Record what happens until the learner is done."""
        began = last_step = last_line = reported = time.monotonic()
        loop = self._plan.config.loop
        gauge = Gauge(began, self._generated, steps=loop.steps, max_lag=loop.max_lag)
        while True:
            running = [task for task in tasks.values() if not task.done()]
            await asyncio.wait(running, timeout=POLL_S, return_when=asyncio.FIRST_COMPLETED)
            for task in tasks.values():
                if task.done():
                    task.result()  # raises what ended the component for good
            now = time.monotonic()
            if self._too_late(now) and not tasks["learner"].done():
                self._abandon(tasks["learner"])
                return
            status = await self._status()
            if self._gauge is None:
                self._see()
                if status.newest_version <= self._version and not tasks["learner"].done():
                    gauge.begin(now, status)
                    self._refuse_a_stall(now - began, status)
                    continue
                began = last_step = last_line = reported = now
                self._gauge = gauge
                self._say("learner is ready; waiting for the first rollouts")
            self._waits.note(status)
            if await self._look(status):
                last_step = reported = now
            if tasks["learner"].done():
                return
            self._refuse_a_stall(now - last_step, status)
            if now - reported >= self._plan.config.stall_report_s:
                reported = now
                await self._report_a_stall(now - last_step, record)
            if now - last_line >= LINE_S and self._history.rows:
                last_line = now
                self._say(progress_line(self._snapshot.status))

    def _too_late(self, now: float) -> bool:
        return self._stopped_at is not None and now - self._stopped_at > STOP_S

    def _abandon(self, learner: asyncio.Future[None]) -> None:
        """The run was stopped, and the step under way takes too long: what is committed stays."""
        learner.cancel()
        self._spawn.end("learner")
        assert self._supervisor is not None
        self._supervisor.components["learner"].enter("left")
        self._without_checkpoint = True

    async def _note_uncommitted(self, record: Recorder) -> None:
        """Say where a run stopped that could not commit its last steps, and how it goes on."""
        status = await self._status()
        if status.step == status.committed_step and not (status.step and self._without_checkpoint):
            return
        record.event("stopped without a checkpoint", step=status.step, committed_step=status.committed_step)
        at = self._snapshot.update(step=status.step, committed_step=status.committed_step)
        note = f"{cut_short(at)}; nothing that was generated is lost"
        self._snapshot.update(note=note)
        self._say(note)

    async def _status(self) -> QueueStatus:
        """Of the queue; a restart of it is waited for."""
        status: QueueStatus = await self._answered(self._line.queue.status, "status of the queue")
        self._queue = status
        return status

    async def _answered(self, call: Callable[[], Awaitable[T]], what: str) -> T:
        limit_s = self._plan.config.supervise.start_s if self._stopped_at is None else STOP_S
        remedy = "Look at driver.log and events.jsonl of the run; continue it with --resume."

        async def asked() -> T:
            try:
                return await call()
            except ConnectionRefusedError as caught:  # Ray constructs it once
                raise ComponentLost(str(caught)) from None

        return await persist(asked, what=f"driver: {what}", remedy=remedy, deadline_s=limit_s)

    async def _look(self, status: QueueStatus, patience_s: float = PATIENCE_S) -> bool:
        """Collect what is new, and tell it in status.json. True when there were new steps."""
        fresh = await self._collect(patience_s)
        assert self._gauge is not None and self._supervisor is not None
        if self._stopped_at is None and fresh:
            self._supervisor.start_later()
        learner = self._learner or LearnerStatus(phase="loading", phase_s=0.0, step=status.step, version=-1)
        rows, held_out = self._history.rows, self._history.held_out
        newest = max(held_out, key=lambda each: int(each["step"]), default=None)
        self._see(
            state="stopping" if self._stopped_at is not None else "running",
            reward=rows[-1]["reward/mean"] if rows else None,
            held_out=None if newest is None else Score(step=newest["step"], mean=newest["mean"]),
            quarantined=status.quarantined,
            **plain(self._gauge.look(time.monotonic(), status, learner, fresh)),
        )
        return bool(fresh)

    def _see(self, **changes: Any) -> None:
        """A new moment in status.json."""
        assert self._supervisor is not None
        components = {
            name: ComponentNow(
                state=each.state, pid=each.pid, node=each.node, restarts=each.restarts, since_s=each.since_s
            )
            for name, each in self._supervisor.components.items()
        }
        self._snapshot.update(
            components=components, incidents=self._supervisor.incidents, incident=self._supervisor.incident, **changes
        )

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

    async def _report_a_stall(self, silent_s: float, record: Recorder) -> None:
        """One message that says what everything waits for, where it is, and what to do."""
        why: str = await self._answered(self._line.queue.stalled, "asking the queue what it waits for")
        assert self._supervisor is not None
        down = [f"{name} is {each.state}" for name, each in self._supervisor.components.items() if each.lost_at]
        text = f"no step ended for {silent_s:.0f} s (stall_report_s): " + "; ".join([why, *down])
        record.event("stalled", silent_s=silent_s, why=text)
        self._say(text)

    async def _collect(self, patience_s: float = PATIENCE_S) -> list[Any]:
        """Fetch and record the steps, evaluations and events since the last time; what is being restarted waits."""
        if self._supervisor is None or self._queue is None:
            return []
        learner = self._supervisor["learner"]
        held_out = self._supervisor["held-out"] if "held-out" in self._supervisor.names else None
        with boundary("collecting what the learner and the evaluation report"):
            parts = (learner, held_out, self._line.queue, self._queue)
            fresh = list(await self._history.collect(*parts, patience_s=patience_s))
            with suppress(ConnectionError, TimeoutError):
                self._learner = await asyncio.wait_for(learner.status(), patience_s)
        for worker in self._history.blamed():
            self._supervisor.refund(worker)
        return fresh

    async def _end(self, tasks: Mapping[str, asyncio.Future[None]], record: Recorder) -> None:
        """The learner is done: let the others finish what they have, and leave."""
        assert self._supervisor is not None
        if stopped := self._stopped_at is not None:
            await self._note_uncommitted(record)
        self._supervisor.ending = lambda name: name not in ("queue", "weights", "held-out") or stopped
        await self._answered(self._line.queue.finish, "ending the run at the queue")
        if not stopped:
            self._supervisor.start_later()
        began = [name for name in self._supervisor.names if self._supervisor[name] is not None or not stopped]
        others = {name: tasks[name] for name in began if name != "learner"}
        late, since, told = set(others.values()), time.monotonic(), None
        while late:
            if "held-out" in tasks and not stopped and told is not (held_out := self._supervisor["held-out"]):
                with suppress(ConnectionError, TimeoutError):  # the next incarnation is told, too
                    await asyncio.wait_for(held_out.finish(), PATIENCE_S)
                    told = held_out
            # Who stops a run does not wait; otherwise the last evaluation may take its time.
            limit_s = LEAVE_S if self._stopped_at is not None else self._plan.config.stall_s
            if time.monotonic() - since > limit_s:
                names = ", ".join(name for name, task in others.items() if task in late)
                self._say(f"{names} did not leave within {limit_s:g} s and will be ended")
                return
            done, late = await asyncio.wait(late, timeout=POLL_S / 4, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
            if not self._without_checkpoint:
                await self._look(await self._status())

    async def _conclude(self, record: Recorder) -> Mapping[str, Any]:
        """Write what a run leaves: result.json, model/ and the rollouts."""
        status = await self._status()
        if not self._without_checkpoint:
            await self._look(status, CLOSE_S if self._stopped_at is None else SOON_S)
        ended = "finished" if status.committed_step >= self._plan.config.loop.steps else "stopped"
        if ended == "finished":  # of one that was stopped, `millrace rollouts` makes the file
            await self._export(record)
        tell_damage = partial(self._history.tell_damage, self._line.queue)
        await self._answered(tell_damage, "damage of the journal")
        assert self._supervisor is not None
        judges = [self._supervisor[name] for name in self._line.workers if name.startswith("reward-")]
        failures = await judge_failures(judges, status, record, say=self._say)
        found = conclude(
            self._plan,
            self._history,
            status,
            await self._answered(self._line.queue.lengths, "lengths of the rollouts"),
            ended=ended,
            idle_workers=self._waits.shares(self._line.workers),
            judge_failures=failures,
        )
        record.event(found["ended"], step=found["steps"])
        self._snapshot.update(state=found["ended"], eta_s=None, waits={})
        return found

    async def _export(self, record: Recorder) -> None:
        try:
            with boundary("writing the rollouts"):
                await asyncio.wait_for(self._line.queue.export(), self._plan.config.stall_s)
        except MillraceError as caught:  # the run is made all the same
            record.event("rollouts not written", cause=str(caught))
            self._say(f"{caught}; `millrace rollouts {self._plan.config.directory}` writes them later")
