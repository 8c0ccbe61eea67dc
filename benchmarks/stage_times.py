"""What each stage of a recorded run takes alone: a process of its own, pinned, in which one stage works at a time.

    generation    the engine alone samples the very draws that were recorded, in as many slots; new weights now and then
    learner       the real learner makes its steps on the very batches; its queue is a script that has them at once
    judge         the verifier judges the very groups

Of a run that is long, a slice of its steps is enough. The times of engine and learner steps are fitted by lines.
"""

import asyncio
import multiprocessing
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from benchmarks.replay_loop import StageTimes
from benchmarks.stage_fit import Step, fitted
from millrace.actors.datasets.loading import columns
from millrace.actors.engines import engine
from millrace.cluster import config as configs
from millrace.cluster.plan import Plan, make_plan
from millrace.cluster.spawn import InProcess
from millrace.cluster.wiring import wire
from millrace.core import schema
from millrace.core.protocols import Feedback, Manifest, Resumption, Sampling, Taken
from millrace.core.types import Group, GroupId, GroupVerdict, Prompt, Rollout, Verdict, VerdictKind, VersionRun
from millrace.core.weights import write
from millrace.learner.model import Policy, load_model
from millrace.learner.publish import Publisher
from millrace.learner.report import StepReport
from millrace.rewards.worker import DeferredJudge

DEADLINE_S = 170.0
WARM_STEPS = 2  # of the learner, not in the fit
LOADS = 6  # of weights while the engine generates


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """A slice of a recorded run."""

    batches: Sequence[Sequence[Group]]  # by step, in order
    scores: Mapping[GroupId, Sequence[float]]

    @property
    def groups(self) -> list[Group]:
        """In the order in which they were drawn."""
        return sorted((group for batch in self.batches for group in batch), key=lambda group: group.id)


def rows_of(directory: Path) -> list[dict[str, Any]]:
    """Rollouts of a finished run."""
    rows: list[dict[str, Any]] = pq.read_table(directory / "rollouts.parquet").to_pylist()
    return rows


def lengths_of(rows: Sequence[Mapping[str, Any]]) -> dict[GroupId, tuple[int, ...]]:
    """Tokens of the responses of every group, by member."""
    found: dict[GroupId, dict[int, int]] = defaultdict(dict)
    for row in rows:
        found[GroupId(row["draw"], row["attempt"])][row["member"]] = len(row["tokens"])
    return {group: tuple(own[member] for member in sorted(own)) for group, own in found.items()}


def trace_of(rows: Sequence[Mapping[str, Any]], prompts: Sequence[Prompt], steps: range) -> Trace:
    """The batches of these steps."""
    by_id = {prompt.id: prompt for prompt in prompts}
    members: dict[GroupId, dict[int, Mapping[str, Any]]] = defaultdict(dict)
    for row in rows:
        if row["steps"] and row["steps"][0] in steps:
            members[GroupId(row["draw"], row["attempt"])][row["member"]] = row
    batches: dict[int, list[Group]] = {step: [] for step in steps}
    scores = {}
    for id_, own in sorted(members.items()):
        ordered = [own[member] for member in sorted(own)]
        rollouts = tuple(_rollout(row) for row in ordered)
        group = Group(id=id_, prompt=by_id[ordered[0]["prompt_id"]], rollouts=rollouts, lease_epoch=1)
        batches[ordered[0]["steps"][0]].append(group)
        scores[id_] = [row["score"] for row in ordered]
    return Trace(batches=list(batches.values()), scores=scores)


def _rollout(row: Mapping[str, Any]) -> Rollout:
    many = len(row["tokens"])
    return Rollout(
        tokens_T=np.array(row["tokens"], np.int32),
        sampled_T=np.ones(many, np.bool_),
        behaviour_logprob_T=np.array(row["behaviour_logprob"], np.float32),
        versions=(VersionRun(0, 0, many),),
        finish_reason=row["finish_reason"],
        seed=row["seed"],
    )


class ScriptedQueue:
    """What a learner asks of the queue; the batches are there."""

    def __init__(self, trace: Trace) -> None:
        self._batches = [_taken(step, batch, trace.scores) for step, batch in enumerate(trace.batches)]
        self._step = 0

    async def join_learner(self) -> Resumption:
        return Resumption(epoch=1, step=0, version=0)

    async def take(self, *, step: int, epoch: int, wait_s: float) -> Taken:
        return self._batches[step]

    async def trained(self, *, step: int, epoch: int, feedback: Feedback) -> int:
        self._step = step + 1
        return self._step

    async def announce(self, *, version: int, epoch: int) -> None:
        """Nobody waits for it."""

    async def commit(self, *, step: int, directory: str, digest: str, epoch: int) -> None:
        """The last step's."""

    async def status(self) -> Any:
        class Nothing:
            commits: Sequence[int] = ()

        return Nothing()


def _taken(step: int, batch: Sequence[Group], scores: Mapping[GroupId, Sequence[float]]) -> Taken:
    verdicts = [
        GroupVerdict(
            id=group.id, verdicts=tuple(Verdict(kind=VerdictKind.SCORED, score=score) for score in scores[group.id])
        )
        for group in batch
    ]
    lag = [(0,) * len(group.rollouts) for group in batch]
    return Taken(step=step, pack=schema.encode(batch), verdicts=verdicts, lag=lag, uses=(0,) * len(batch))


class _Spawn(InProcess):
    """Builds a run's learner beside a scripted queue, and keeps what it publishes."""

    def __init__(self, queue: ScriptedQueue) -> None:
        self._queue = queue

    def __call__(self, cls: type, *args: Any, name: str, **kwargs: Any) -> Any:
        return self._queue if name == "queue" else super().__call__(cls, *args, name=name, **kwargs)


async def learner_reports(plan: Plan, trace: Trace, directory: Path) -> Sequence[StepReport]:
    """Of the real learner's steps on the recorded batches."""
    loop = plan.config.loop.model_copy(update={"steps": len(trace.batches)})
    journal = plan.config.journal.model_copy(update={"on_disk": False})
    config = plan.config.model_copy(update={"runs": str(directory), "loop": loop, "journal": journal})
    assembled = wire(replace(plan, config=config, held_out=()), _Spawn(ScriptedQueue(trace)))
    learner = assembled.makers["learner"]()
    await learner.run()
    reports: Sequence[StepReport] = await learner.reports(after=0)
    return reports


class EngineAlone:
    """A run's engine, whose steps are noted."""

    def __init__(self, plan: Plan) -> None:
        self._sampling: Sampling = plan.sampling
        self._engine: Any = engine(**plan.engine)
        self._core = self._engine._core
        self._scheduler = self._core._core.scheduler
        self._scheduled = (0, 0)
        self._steps: list[Step] = []
        self._version = 0
        self._watch()

    def _watch(self) -> None:
        step, schedule = self._core.step, self._scheduler.schedule

        def noted_schedule(*args: Any, **kwargs: Any) -> Any:
            found = schedule(*args, **kwargs)
            self._scheduled = (len(found.num_scheduled_tokens), found.total_num_scheduled_tokens)
            return found

        def noted_step() -> Any:
            began = time.perf_counter()
            finished = step()
            sequences, tokens = self._scheduled
            self._steps.append(Step(sequences, tokens - sequences, time.perf_counter() - began))
            return finished

        self._core.step, self._scheduler.schedule = noted_step, noted_schedule

    async def generate(
        self, groups: Sequence[Group], weights: tuple[Manifest, Any], directory: Path
    ) -> tuple[list[Step], list[float]]:
        """The steps of all their responses, begun at once, and how long each load of weights stopped them."""
        self._steps.clear()
        tokens, generated = sum(group.tokens for group in groups), self._engine.generated
        calls = [
            asyncio.create_task(
                self._engine.sample(group.prompt.tokens_P, sampling=self._sampling, seeds=[seed], key=key)
            )
            for group in groups
            for member, rollout in enumerate(group.rollouts)
            for seed, key in [(rollout.seed, f"{group.id} {member}")]
        ]
        manifest, buffer = weights
        pauses = []
        for number in range(LOADS):
            while self._engine.generated - generated < tokens * (number + 1) / (LOADS + 1) and not all(
                call.done() for call in calls
            ):
                await asyncio.sleep(0.005)
            self._version += 1
            handle = write(str(directory), replace(manifest, version=self._version), buffer)
            pauses.append((await self._engine.load(handle, prove=False)).pause_s)
        await asyncio.gather(*calls)
        return list(self._steps), pauses


async def judged_s(plan: Plan, trace: Trace) -> float:
    """Seconds per group of the run's verifier."""
    words = tuple(sorted(columns(plan.prompts) - {"answer"}))
    assert plan.verifier is not None
    judge = DeferredJudge(plan.verifier, plan.config.model, words, plan.config.rewards)
    groups = trace.groups
    await judge(groups[0].prompt, groups[0].rollouts)
    began = time.perf_counter()
    for group in groups:
        await judge(group.prompt, group.rollouts)
    return (time.perf_counter() - began) / len(groups)


class StagesAlone:
    """A recorded run's stages in this process."""

    def __init__(self, run: Path, table: Mapping[str, Any], steps: range, threads: int) -> None:
        """
        Args:
            run: its directory.
            table: its configuration, as `runs.execute` got it.
            steps: of the recorded run, whose batches stand for all.
            threads: of engine and learner.
        """
        torch.set_num_threads(threads)
        config = configs.of(dict(table), root=run.parent.parent, source="benchmark")
        learner = config.learner.model_copy(update={"threads": threads})
        self._plan = make_plan(config.model_copy(update={"learner": learner}))
        self._trace = trace_of(rows_of(run), self._plan.prompts, steps)
        self._engine = EngineAlone(self._plan)
        self._weights = Publisher(Policy(load_model(config.model))).pack(version=0, step=0, epoch=0)
        self._runner = asyncio.Runner()  # one event loop, to which an engine may be bound

    def measure(self) -> tuple[StageTimes, dict[str, Any]]:
        """Every stage, one after the other."""
        with tempfile.TemporaryDirectory() as directory:
            return self._runner.run(self._measured(Path(directory)))

    async def _measured(self, directory: Path) -> tuple[StageTimes, dict[str, Any]]:
        reports = (await learner_reports(self._plan, self._trace, directory / "runs"))[WARM_STEPS:]
        steps, pauses = await self._engine.generate(self._trace.groups, self._weights, directory)
        return fitted(steps, pauses, reports, await judged_s(self._plan, self._trace))


def serve(connection: Connection, run: Path, table: Mapping[str, Any], steps: range, cores: Sequence[int]) -> None:
    """The body of a process: build, say so, then measure per request, until told None."""
    os.sched_setaffinity(0, cores)
    stages = StagesAlone(run, table, steps, len(cores))
    stages.measure()  # what is slow once is not measured
    connection.send(f"each stage alone: {len(cores)} core(s), steps {steps.start} to {steps.stop - 1} of {run.name}")
    while connection.recv() is not None:
        connection.send(stages.measure())


@contextmanager
def process(
    run: Path, table: Mapping[str, Any], steps: range, cores: Sequence[int]
) -> Iterator[Callable[[], tuple[StageTimes, dict[str, Any]]]]:
    """A process that may use these cores; what it gives measures all stages now. It ends with the block."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    started = context.Process(target=serve, args=(theirs, run, table, steps, cores), daemon=True)
    started.start()
    theirs.close()
    try:
        print(f"  {_answer(ours)}")

        def measure() -> tuple[StageTimes, dict[str, Any]]:
            ours.send("measure")
            found: tuple[StageTimes, dict[str, Any]] = _answer(ours)
            return found

        yield measure
    finally:
        with suppress(BrokenPipeError):  # it has failed
            ours.send(None)
        started.join(timeout=10)
        if started.is_alive():
            started.kill()


def _answer(connection: Connection) -> Any:
    if not connection.poll(DEADLINE_S):
        raise TimeoutError(f"the stages did not answer within {DEADLINE_S:g} s")
    return connection.recv()
