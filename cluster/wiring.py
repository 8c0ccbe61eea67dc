"""The line, written once for one process and for Ray.

          ReplayQueue: ledger and queue
   lease |       ^ put     lease |       ^ put          take |      ^ trained, commit
         v       |               v       |                   v      |
    GenerationWorker         RewardWorker                  Learner --- publish --> FileWeightStore
         ^                                                                              |
         +---------------------------------- fetch ------------------------------------+----> HeldOut

    GenerationWorker   consumes draws and published weights; waits for admission;     unblocked by trained
    RewardWorker       consumes generated groups;            waits for a group;       unblocked by put_groups
    Learner            consumes judged groups;               waits for a full batch;  unblocked by put_verdicts
    HeldOut            consumes the weights held for it;     waits for the next;      unblocked by publish

Each knows the queue and the store alone, so any of them can come and go without the others noticing. Queue, store
and a learner without a GPU live on the machine that started the run, whose disk holds the run directory; a learner on
another machine needs that directory on a shared file system.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from millrace.actors.datasets.loading import columns
from millrace.actors.generation import GenerationWorker
from millrace.actors.prompt_source import DatasetOrder
from millrace.cluster.held_out import HeldOut
from millrace.cluster.plan import Plan
from millrace.cluster.spawn import Spawn
from millrace.core.replay.journal import LineJournal
from millrace.core.replay.queue import ReplayQueue
from millrace.core.weight_store import FileWeightStore, NodeStore
from millrace.learner.learner import Learner
from millrace.rewards.shaping import Shaping
from millrace.rewards.worker import DeferredJudge, RewardWorker


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """The components of a run, as handles."""

    queue: Any
    store: Any
    learner: Any
    workers: Mapping[str, Any]  # generation and reward workers, by name
    held_out: Any | None

    @property
    def engines(self) -> dict[str, Any]:
        """Those that hold an engine, and close it when they are told to."""
        own = {name: worker for name, worker in self.workers.items() if name.startswith("generation-")}
        return own if self.held_out is None else {**own, "held-out": self.held_out}


def wire(plan: Plan, spawn: Spawn) -> Line:
    """Make the components of a run and connect them. Nothing runs yet."""
    run, loop = plan.config, plan.config.loop
    directory = run.directory
    words = tuple(sorted(columns(plan.prompts) - {"answer"}))
    hold = {"hold_every": run.evaluation.every, "hold_last": loop.steps} if plan.held_out else {}
    store = spawn(FileWeightStore, str(directory / "weights"), name="weights", home=True, **hold)
    source = DatasetOrder(plan.prompts, seed=run.seed, shuffle=run.data.shuffle)
    journal = LineJournal(directory / "ledger.jsonl")
    queue = spawn(ReplayQueue, plan.loop, source, seed=run.seed, journal=journal, name="queue", home=True)
    learner = spawn(
        Learner,
        plan.learner,
        model=run.model,
        reference=plan.reference,
        objective=run.recipe.objective,
        shaping=partial(Shaping.of, run.judging),
        updates=run.recipe.updates,
        queue=queue,
        store=store,
        directory=str(directory / "checkpoints"),
        steps=loop.steps,
        temperature=plan.sampling.temperature,
        max_tokens=plan.sampling.max_tokens,
        max_lag=loop.max_lag,
        name="learner",
        gpus=run.learner.gpus,
        home=not run.learner.gpus,
    )
    workers = {**_generation(plan, spawn, queue, NodeStore(store)), **_rewards(plan, spawn, queue, words)}
    held_out = None
    if plan.held_out:
        assert plan.verifier is not None
        held_out = spawn(
            HeldOut,
            "held-out",
            store=NodeStore(store),
            engine={**plan.engine, "slots": run.evaluation.slots},
            prompts=plan.held_out,
            judge=DeferredJudge(plan.verifier, run.model, words, run.rewards),
            config=plan.evaluation,
            gpus=run.evaluation.gpus,
            name="held-out",
        )
    return Line(queue=queue, store=store, learner=learner, workers=workers, held_out=held_out)


def _generation(plan: Plan, spawn: Spawn, queue: Any, store: Any) -> dict[str, Any]:
    section = plan.config.generation
    return {
        name: spawn(
            GenerationWorker,
            name,
            queue=queue,
            store=store,
            engine=plan.engine,
            config=section,
            sampling=plan.sampling,
            gpus=section.gpus,
            name=name,
        )
        for name in (f"generation-{i}" for i in range(section.workers))
    }


def _rewards(plan: Plan, spawn: Spawn, queue: Any, words: tuple[str, ...]) -> dict[str, Any]:
    run = plan.config
    return {
        name: spawn(
            RewardWorker,
            name,
            queue=queue,
            verifier=plan.verifier,
            tokenizer=run.model,
            columns=words,
            config=run.rewards,
            name=name,
        )
        for name in (f"reward-{i}" for i in range(run.rewards.workers))
    }
