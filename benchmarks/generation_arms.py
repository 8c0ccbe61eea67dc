"""The two arms of benchmarks/generation.py: each is a process with an engine that stays, and works when it is told to.

Ours is the real GenerationWorker, ReplayQueue and FileWeightStore in one process; judge and learner are scripts that
take what is there and return at once, so that admission never blocks. Raw is vLLM's own `LLM.generate`.
"""

import asyncio
import os
import time
from dataclasses import replace
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.generation_work import Done, Setting, Work, order, prompts
from millrace.actors.config import GenerationConfig
from millrace.actors.engines import engine
from millrace.actors.generation import GenerationWorker
from millrace.cluster.spawn import here
from millrace.core import schema
from millrace.core.protocols import Feedback, Manifest, Role, Sampling
from millrace.core.replay.config import QueueConfig
from millrace.core.replay.queue import ReplayQueue
from millrace.core.types import GroupVerdict, Verdict, VerdictKind, WorkerId
from millrace.core.weight_store import FileWeightStore
from millrace.learner.model import Policy, load_model
from millrace.learner.publish import Publisher

GROUPS_PER_STEP = 8
SCORE = Verdict(kind=VerdictKind.SCORED, score=0.0)


class Arm(Protocol):
    """Generates a burst."""

    def run(self, work: Work) -> Done: ...


def serve(connection: Connection, arm: str, setting: Setting) -> None:
    """The body of an arm's process: build, say so, then a burst per request, until told None."""
    os.sched_setaffinity(0, setting.cores)
    torch.set_num_threads(1)
    built: Arm = Ours(setting) if arm == "ours" else import_module("benchmarks.raw_vllm").Raw(setting)
    connection.send(f"{arm}: torch threads {torch.get_num_threads()}, cores {sorted(os.sched_getaffinity(0))}")
    while (work := connection.recv()) is not None:
        connection.send(built.run(work))


class Ours:
    """A generation worker and what stands around it. The engine stays; the worker and the queue are a burst's own."""

    def __init__(self, setting: Setting) -> None:
        self._source = order(prompts(setting))
        self._slots = setting.slots
        self._engine = engine(
            setting.engine, model=setting.model, slots=setting.slots, max_model_len=setting.max_model_len
        )
        self._weights = Publisher(Policy(load_model(setting.model))).pack(version=0, step=0, epoch=0)
        self._directory = Path(setting.directory)
        self._bursts = 0
        self._runner = asyncio.Runner()  # one event loop, to which an engine may be bound

    def run(self, work: Work) -> Done:
        """Generate `work.groups` groups, from an empty queue to the last accepted group."""
        self._bursts += 1
        return self._runner.run(self._burst(work))

    async def _burst(self, work: Work) -> Done:
        steps = work.groups // GROUPS_PER_STEP
        config = QueueConfig(
            groups_per_step=GROUPS_PER_STEP, group_size=work.group_size, steps=steps, max_lag=steps, stale="train"
        )
        store: Any = here(FileWeightStore, str(self._directory / f"weights-{self._bursts}"), name="weights")
        queue: Any = here(ReplayQueue, config, self._source, seed=self._bursts, name="queue")
        learner = ScriptedLearner(queue, store, self._weights, steps=steps, publish_every=work.publish_every)
        await learner.begin()
        # A new worker holds an engine of an earlier burst: it gets this burst's version 0 before the clock starts.
        await self._engine.load(await store.fetch(0), prove=True)
        worker = GenerationWorker(
            WorkerId("generation-0"),
            queue=queue,
            store=store,
            engine=self._engine,
            config=GenerationConfig(slots=self._slots),
            sampling=Sampling(max_tokens=work.max_tokens, stop_token_ids=work.stop_token_ids),
        )
        helpers = [asyncio.create_task(judge(queue)), asyncio.create_task(learner.run())]
        generated, began, began_cpu = self._engine.generated, time.perf_counter(), time.process_time()
        await worker.run()
        seconds, cpu_s = time.perf_counter() - began, time.process_time() - began_cpu
        await asyncio.gather(*helpers)
        status = await queue.status()
        tokens = self._engine.generated - generated
        assert status.tokens["trained"] == tokens, f"{dict(status.tokens)} of {tokens} generated"
        facts = await worker.status()
        return Done(
            tokens=tokens,
            seconds=seconds,
            cpu_s=cpu_s,
            details={
                "lease_calls": facts["lease_calls"],
                "put_calls": facts["put_calls"],
                "loads": facts["loads"],
                "most_unfinished": facts["most_unfinished"],
            },
        )


async def judge(queue: Any) -> None:
    """Give every group the same score, at once, until the run is over."""
    epoch = await queue.join("reward-0", role=Role.REWARD, slots=64)
    asked = 0
    while True:
        asked += 1
        pack = await queue.lease_groups("reward-0", epoch=epoch, want=64, request=f"lease {asked}", wait_s=0.5)
        if not pack:
            status = await queue.status()
            if status.states.get("committed", 0) or status.committed_step:
                return
            continue
        verdicts = [GroupVerdict(id=each.id, verdicts=(SCORE,) * each.n) for each in schema.headers(pack)]
        await queue.put_verdicts("reward-0", epoch=epoch, verdicts=verdicts, request=f"put {asked}")


class ScriptedLearner:
    """Takes and is done: every `publish_every` steps it publishes the same weights as a new version."""

    def __init__(
        self, queue: Any, store: Any, weights: tuple[Manifest, Any], *, steps: int, publish_every: int
    ) -> None:
        self._queue, self._store = queue, store
        self._manifest, self._buffer = weights
        self._steps, self._publish_every = steps, publish_every
        self._epoch = -1

    async def begin(self) -> None:
        """Join, and announce version 0."""
        resumption = await self._queue.join_learner()
        self._epoch = resumption.epoch
        await self._announce(resumption.version, 0)

    async def run(self) -> None:
        """Train every batch."""
        for step in range(self._steps):
            while (taken := await self._queue.take(step=step, epoch=self._epoch, wait_s=2.0)) is None:
                pass
            tokens = sum(each.tokens for each in schema.headers(taken.pack))
            version = await self._queue.trained(step=step, epoch=self._epoch, feedback=Feedback(trained_tokens=tokens))
            if self._publish_every and (step + 1) % self._publish_every == 0:
                await self._announce(version, step + 1)
        await self._queue.commit(step=self._steps, directory="none", digest="", epoch=self._epoch)

    async def _announce(self, version: int, step: int) -> None:
        manifest = replace(self._manifest, version=version, step=step, epoch=self._epoch)
        await self._store.publish(manifest, self._buffer)
        await self._queue.announce(version=version, epoch=self._epoch)
