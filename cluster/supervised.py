"""A run whose recipe learns from the data's answers: one component, no queue."""

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from millrace.cluster.plan import Plan
from millrace.cluster.progress import count, duration
from millrace.cluster.record import Recorder, plain
from millrace.cluster.result import SCHEMA_VERSION, packages
from millrace.cluster.spawn import Spawn
from millrace.core.errors import MillraceError, boundary
from millrace.core.recipe import ObjectiveConfig
from millrace.core.types import Prompt
from millrace.learner.step import StepNumbers
from millrace.learner.supervised import SupervisedConfig, SupervisedResult, train_supervised

POLL_S = 0.5
LINE_S = 5.0


class SupervisedLearner:
    """Trains in a thread, so that its losses can be read meanwhile."""

    def __init__(
        self,
        *,
        model: str,
        rows: Sequence[Prompt],
        directory: str,
        config: SupervisedConfig,
        objective: ObjectiveConfig,
    ) -> None:
        self._arguments = (model, rows, directory, config)
        self._objective = objective
        self._losses: list[StepNumbers] = []

    async def run(self) -> SupervisedResult:
        return await asyncio.to_thread(
            train_supervised,
            *self._arguments,
            objective=self._objective,
            on_step=lambda _, numbers: self._losses.append(numbers),
        )

    async def losses(self, *, after: int) -> Sequence[StepNumbers]:
        """The numbers of all steps but the first `after`."""
        return self._losses[after:]


async def run_supervised(plan: Plan, *, spawn: Spawn, say: Callable[[str], None]) -> Mapping[str, Any]:
    """Train, record, and leave result.json and model/.

    Raises:
        MillraceError: of the data, the model, or the training itself.
    """
    run, directory = plan.config, plan.config.directory
    assert plan.supervision is not None
    learner = spawn(
        SupervisedLearner,
        model=run.model,
        rows=plan.prompts,
        directory=str(directory / "model"),
        config=plan.supervision,
        objective=run.recipe.objective,
        name="learner",
        gpus=run.learner.gpus,
    )
    steps = plan.supervision.epochs * -(-len(plan.prompts) // plan.supervision.batch_rows)
    with Recorder(directory) as record:
        try:
            with boundary("learner"):
                done_with = await _watched(learner, steps, record, say)
        except MillraceError as caught:
            record.event("failed", cause=str(caught))
            raise
        record.event("finished", step=done_with.steps)
    found = plain(
        {
            "schema": SCHEMA_VERSION,
            "name": run.name,
            "ended": "finished",
            "recipe": run.recipe.origin,
            "seed": run.seed,
            "packages": packages(),
            **asdict(done_with),
            "directory": str(directory),
        }
    )
    (directory / "result.json").write_text(json.dumps(found, indent=2) + "\n")
    say(f"{count(done_with.tokens)} tokens, loss {done_with.first_loss:.3f} -> {done_with.last_loss:.3f}")
    return dict(found)


async def _watched(learner: Any, steps: int, record: Recorder, say: Callable[[str], None]) -> SupervisedResult:
    """Record what it does until it is done."""
    task: asyncio.Future[SupervisedResult] = asyncio.ensure_future(learner.run())
    began = said = time.monotonic()
    seen = 0
    while True:
        done, _ = await asyncio.wait([task], timeout=POLL_S)
        for numbers in await learner.losses(after=seen):
            seen += 1
            record.metrics(seen, {"train/loss": numbers.loss, "train/gradient_norm": numbers.gradient_norm})
        if done:
            return task.result()
        now = time.monotonic()
        if seen and now - said >= LINE_S:
            said = now
            eta_s = (steps - seen) * (now - began) / seen
            say(f"step {seen}/{steps}  loss {numbers.loss:.3f} nats per token  eta {duration(eta_s)}")
