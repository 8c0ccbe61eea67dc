"""A run whose recipe learns from the data's answers: one component, no queue."""

import asyncio
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from millrace.cluster.plan import Plan
from millrace.cluster.progress import count, duration
from millrace.cluster.record import Recorder, plain
from millrace.cluster.result import SCHEMA_VERSION, packages
from millrace.cluster.run_directory import RESULT
from millrace.cluster.snapshot import LearnerNow, Snapshot
from millrace.cluster.spawn import Spawn
from millrace.cluster.trackers import tracked
from millrace.core.errors import MillraceError, boundary
from millrace.learner.report import SupervisedResult

LEARNER = "millrace.learner.supervised:SupervisedLearner"  # by its place, as in wiring.py
POLL_S = 0.5
LINE_S = 5.0


class SupervisedRun:
    """Trains a plan's model once. Call `execute`; `stop` from anywhere in the same loop ends it in order."""

    def __init__(
        self, plan: Plan, *, spawn: Spawn, say: Callable[[str], None], snapshot: Snapshot | None = None
    ) -> None:
        assert plan.supervision is not None
        run = plan.config
        self._run, self._config, self._say = run, plan.supervision, say
        self._steps = plan.supervision.epochs * -(-len(plan.prompts) // plan.supervision.batch_rows)
        self._snapshot = snapshot or Snapshot(run.directory, name=run.name)
        self._learner = spawn(
            LEARNER,
            model=run.model,
            rows=plan.prompts,
            directory=str(run.directory / "model"),
            config=plan.supervision,
            objective=run.recipe.objective,
            name="learner",
            gpus=run.learner.gpus,
        )

    async def stop(self) -> None:
        """Finish the step under way, save the model, and end."""
        self._snapshot.update(state="stopping")
        await self._learner.stop()

    async def execute(self) -> Mapping[str, Any]:
        """Train, record, and leave result.json and model/.

        Raises:
            MillraceError: of the data, the model, or the training itself.
        """
        run = self._run
        with Recorder(run.directory) as record:
            told = tracked(
                run.tracking, run.model_dump(mode="json"), record=record, snapshot=self._snapshot, say=self._say
            )
            try:
                async with told:
                    with boundary("learner"):
                        done = await _watched(self._learner, self._steps, record, self._say, self._snapshot)
            except MillraceError as caught:
                record.event("failed", cause=str(caught))
                raise
            ended = "finished" if done.steps == self._steps else "stopped"
            record.event(ended, step=done.steps)
        found = plain(
            {
                "schema": SCHEMA_VERSION,
                "name": run.name,
                "ended": ended,
                "recipe": run.recipe.origin,
                "seed": run.seed,
                "packages": packages(),
                **asdict(done),
                "directory": str(run.directory),
            }
        )
        (run.directory / RESULT).write_text(json.dumps(found, indent=2) + "\n")
        self._snapshot.update(
            state=ended, step=done.steps, eta_s=None, learner=LearnerNow(phase="stopped", phase_s=0.0, wait_share=0.0)
        )
        self._say(f"{count(done.tokens)} tokens, loss {done.first_loss:.3f} -> {done.last_loss:.3f}")
        return dict(found)


async def _watched(
    learner: Any, steps: int, record: Recorder, say: Callable[[str], None], snapshot: Snapshot
) -> SupervisedResult:
    """Record what it does until it is done."""
    task: asyncio.Future[SupervisedResult] = asyncio.ensure_future(learner.run())
    began = said = time.monotonic()
    seen = 0
    snapshot.update(steps=steps)
    while True:
        done, _ = await asyncio.wait([task], timeout=POLL_S)
        for numbers in await learner.losses(after=seen):
            seen += 1
            record.metrics(seen, {"train/loss": numbers.loss, "train/gradient_norm": numbers.gradient_norm})
        if done:
            return task.result()
        now = time.monotonic()
        if not seen:
            snapshot.update()
            continue
        eta_s = (steps - seen) * (now - began) / seen
        state = "stopping" if snapshot.status.state == "stopping" else "running"
        phase = LearnerNow(phase="computing", phase_s=now - began, wait_share=0.0)
        snapshot.update(state=state, step=seen, eta_s=eta_s, learner=phase)
        if now - said >= LINE_S:
            said = now
            say(f"step {seen}/{steps}  loss {numbers.loss:.3f} nats per token  eta {duration(eta_s)}")
