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

Each knows the queue and the store alone, so any of them can come and go without the others noticing: what is lost is
made anew (cluster/supervise/). Queue, store and a learner without a GPU live on the machine that started the run,
whose disk holds the run directory; a learner on another machine needs that directory on a shared file system.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from millrace.actors.datasets.loading import columns
from millrace.actors.generation import GenerationWorker
from millrace.actors.prompt_source import DatasetOrder
from millrace.cluster.held_out import HeldOut
from millrace.cluster.plan import Plan
from millrace.cluster.spawn import Spawn
from millrace.core.replay.disk import DiskJournal
from millrace.core.replay.queue import ReplayQueue
from millrace.core.weight_store import FileWeightStore, NodeStore
from millrace.rewards.shaping import Shaping
from millrace.rewards.worker import DeferredJudge, RewardWorker

Maker = Callable[[], Any]  # of a component: a new incarnation each time
LEARNER = "millrace.learner.learner:Learner"  # by its place: what it imports takes seconds, and the driver needs none


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """The components of a run: two as handles that outlive their processes, the others as ways to make them."""

    queue: Any
    store: Any
    makers: Mapping[str, Maker]  # learner, generation and reward workers, held-out; by name

    @property
    def engines(self) -> list[str]:
        """Those that hold an engine, and close it when they are told to."""
        return [name for name in self.makers if name.startswith("generation-") or name == "held-out"]

    @property
    def workers(self) -> list[str]:
        """Generation and reward workers."""
        return [name for name in self.makers if name not in ("learner", "held-out")]


def wire(plan: Plan, spawn: Spawn) -> Line:
    """Make queue and store, and say how the others are made and connected. Nothing runs yet."""
    run, loop = plan.config, plan.config.loop
    directory = run.directory
    words = tuple(sorted(columns(plan.prompts) - {"answer"}))
    hold = {"hold_every": run.evaluation.every, "hold_last": loop.steps} if plan.held_out else {}
    store = spawn(FileWeightStore, str(directory / "weights"), name="weights", home=True, lasting=True, **hold)
    source = DatasetOrder(plan.prompts, seed=run.seed, shuffle=run.data.shuffle)
    journal = DiskJournal(directory, run.journal) if run.journal.on_disk else None
    queue = spawn(ReplayQueue, plan.loop, source, seed=run.seed, journal=journal, name="queue", home=True, lasting=True)
    makers = {
        **_generation(plan, spawn, queue, NodeStore(store)),  # first: an engine takes longest to load
        "learner": _learner(plan, spawn, queue, NodeStore(store)),
        **_rewards(plan, spawn, queue, words),
    }
    if plan.held_out:
        assert plan.verifier is not None
        makers["held-out"] = partial(
            spawn,
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
    return Line(queue=queue, store=store, makers=makers)


def _learner(plan: Plan, spawn: Spawn, queue: Any, store: Any) -> Maker:
    run, loop = plan.config, plan.config.loop
    return partial(
        spawn,
        LEARNER,
        plan.learner,
        model=run.model,
        reference=plan.reference,
        objective=run.recipe.objective,
        shaping=partial(Shaping.of, run.judging),
        updates=run.recipe.updates,
        queue=queue,
        store=store,
        directory=str(run.directory / "checkpoints"),
        steps=loop.steps,
        temperature=plan.sampling.temperature,
        max_tokens=plan.sampling.max_tokens,
        max_lag=loop.max_lag,
        name="learner",
        gpus=run.learner.gpus,
        home=not run.learner.gpus,
    )


def _generation(plan: Plan, spawn: Spawn, queue: Any, store: Any) -> dict[str, Maker]:
    section = plan.config.generation
    return {
        name: partial(
            spawn,
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


def _rewards(plan: Plan, spawn: Spawn, queue: Any, words: tuple[str, ...]) -> dict[str, Maker]:
    run = plan.config
    return {
        name: partial(
            spawn,
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
