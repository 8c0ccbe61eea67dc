"""Learner: takes the batch of a step, learns, publishes, commits.

    consumes      batches of judged groups (`take`), in the order the ledger recorded
    waits for     a full batch, and nothing else
    unblocked by  reward workers that put verdicts

It begins with the last commit whose checkpoint is whole, whose version it publishes and announces before the first
batch. Steps after it are made again, to the bit: batches come in the same rounds, random numbers depend on the step
alone, and memories go on as a checkpoint gives them back. Everything that computes runs on one thread of its own, so
that the event loop answers `status` while a step is under way.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch

from millrace.core.calls import persist
from millrace.core.errors import DiskFullError, LedgerError
from millrace.core.failpoint import reach
from millrace.core.protocols import Clock, Feedback, Queue, Resumption, WeightStore
from millrace.core.recipe import ObjectiveConfig, Updates
from millrace.learner import checkpoint, retention
from millrace.learner.assemble import Assembled
from millrace.learner.batches import Batch, Batches, at_step
from millrace.learner.checkpoint import LearnerState, Saved
from millrace.learner.config import LearnerConfig
from millrace.learner.joining import join
from millrace.learner.judged import Shaping, Unshaped
from millrace.learner.loading import load_policy
from millrace.learner.objective import Objective
from millrace.learner.optimiser import Optimiser
from millrace.learner.phases import Phases
from millrace.learner.publish import Publisher
from millrace.learner.reference import move
from millrace.learner.report import LearnerStatus, StepNumbers, StepReport, of_plain, to_plain
from millrace.learner.reporting import report_of
from millrace.learner.step import Interrupted, Steps, make_steps
from millrace.learner.tokenizer import load_tokenizer

T = TypeVar("T")

TAKE_WAIT_S = 2.0  # how long one `take` waits
GRACE_S = 2.0  # a step under way that is not made so long after `stop` is given up, where none of it shows yet


class Learner:
    """The learner of one run. `run` is the loop; it returns when `steps` are made or `stop` was called.

    Args:
        config: sizes and the optimiser.
        model: directory or hub id of the policy at step 0.
        objective: of the recipe.
        queue: gives batches.
        store: takes weights.
        directory: of checkpoints.
        steps: of the whole run; None: until stopped.
        temperature: of sampling.
        max_lag: above it tokens are masked in batches that say so.
        reference: directory or hub id of the reference model that some objectives need, as it begins.
        shaping: makes the recipe's shapers and filters.
        updates: how often each batch is learnt from.
        max_tokens: the longest response that sampling allows.
        on_step: gets the report of each step.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        config: LearnerConfig,
        *,
        model: str,
        objective: ObjectiveConfig | Mapping[str, Any],
        queue: Queue,
        store: WeightStore,
        directory: str,
        steps: int | None = None,
        temperature: float = 1.0,
        max_lag: int | None = None,
        reference: str | None = None,
        shaping: Callable[[], Shaping] = Unshaped,
        updates: Updates | None = None,
        max_tokens: int = 0,
        on_step: Callable[[StepReport], Awaitable[None]] | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self._config = config
        self._model, self._reference = model, reference
        self.objective = Objective.of(objective, models=frozenset({"reference"} if reference else ()))
        self._queue, self._store = queue, store
        self._directory = directory
        self._steps = steps
        self._temperature = temperature
        self._updates = updates or Updates()
        self._batches = Batches(
            config, self.objective, shaping(), self._updates, max_tokens=max_tokens, max_lag=max_lag
        )
        self._on_step = on_step
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="learner")
        self._stopped = asyncio.Event()
        self._stopped_at_s = 0.0
        self._phases = Phases(clock)
        self._step = 0
        self._version = -1
        self._epoch = 0
        self._committed: list[tuple[str, float]] = []  # directory, mean reward
        self._since_commit: list[float] = []  # mean reward of each step
        self._reports: list[StepReport] = []
        self._told = 0  # of them whoever asks has got
        self._events: list[Mapping[str, Any]] = []
        self._weights = ""  # sha256 of the last published

    async def run(self) -> None:
        """Join, resume, publish; then take, learn, publish, commit, until the end.

        Raises:
            ModelError: the model or its tokenizer will not do.
            TrainingError: a step cannot be made, or no checkpoint can be read; what was committed stays.
            CheckpointError: the last checkpoint cannot be written.
            Fenced: another learner has joined.
        """
        try:
            if await self._unless_stopped(self._begin()) is None:
                return
            await self._publish()
            while not self._stopping and (self._steps is None or self._step < self._steps):
                await self._one_step()
            if self._since_commit:
                await self._commit(last=True)
        finally:
            self._phases.enter("stopped")
            self._thread.shutdown(wait=False, cancel_futures=True)

    async def stop(self) -> None:
        """Commit, and return from `run`. Loading and waiting end at once; a step under way is made if it is short."""
        if not self._stopping:
            self._stopped_at_s = self._clock()
        self._stopped.set()

    async def status(self) -> LearnerStatus:
        """What it does, and since when. Answered while a step is computed."""
        return LearnerStatus(
            phase=self._phases.now,
            phase_s=self._phases.lasts_s,
            step=self._step,
            version=self._version,
        )

    async def reports(self, *, after: int) -> Sequence[StepReport]:
        """Of all steps that this incarnation made, and of those before that nobody had got when it began.

        The first `after` are left out; the caller has got them, and their rollouts are forgotten.
        """
        self._told = after
        for at in range(after - 1, -1, -1):
            if not self._reports[at].samples:
                break
            self._reports[at] = replace(self._reports[at], samples=())
        return self._reports[after:]

    async def events(self, *, after: int) -> Sequence[Mapping[str, Any]]:
        """What this incarnation skipped or refused, without the first `after`.

        A step or an update that was not made, a checkpoint that could not be read or written: each with its `kind`,
        its `step` and `why`.
        """
        return self._events[after:]

    async def checkpoint(self) -> str | None:
        """The directory of the last commit; None before the first."""
        return self._committed[-1][0] if self._committed else None

    async def _begin(self) -> Resumption:
        """Join, and load what the ledger resumes with."""
        resumption, refused = await join(
            partial(self._ask, "join_learner", self._queue.join_learner), verify=self._verify, revert=self._revert
        )
        await self._in_thread(partial(self._open, resumption, refused))
        self._step, self._version, self._epoch = resumption.step, resumption.version, resumption.epoch
        return resumption

    async def _verify(self, resumption: Resumption) -> None:
        assert resumption.directory is not None
        await self._in_thread(partial(checkpoint.verify, resumption.directory, resumption.digest))

    async def _revert(self, resumption: Resumption, step: int, why: str) -> None:
        self._tell("checkpoint refused", resumption.step, why, directory=resumption.directory, reverts_to=step)
        await self._ask("revert", partial(self._queue.revert, step=step))

    def _open(self, resumption: Resumption, refused: Sequence[str]) -> None:
        if self._config.threads is not None:
            torch.set_num_threads(self._config.threads)
        torch.manual_seed(self._config.seed)
        self._tokenizer = load_tokenizer(self._model)
        self.policy = load_policy(
            self._model,
            self._config,
            reference=self._reference,
            reference_moves=self.objective.moves_reference,
            temperature=self._temperature,
        )
        self._optimiser = Optimiser(self.policy.model.named_parameters(), self._config)
        if resumption.directory is not None:
            self._restore(resumption)
        stay = [*refused, *(directory for directory, _ in self._committed)]  # refused ones until the next commit
        retention.collect(self._directory, stay, epoch=resumption.epoch)
        self._publisher = Publisher(self.policy, dtype=self._config.publish_dtype, probe_every=self._config.probe_every)

    def _restore(self, resumption: Resumption) -> None:
        assert resumption.directory is not None
        state = checkpoint.restore(resumption.directory, policy=self.policy, optimiser=self._optimiser)
        if state.step != resumption.step:
            raise LedgerError(
                f"checkpoint {resumption.directory} was written after step {state.step}, the ledger resumes at step"
                f" {resumption.step}: they are of different runs; give the run its own checkpoint directory"
            )
        self._batches.restore(state.memory)
        self._reports = [of_plain(each) for each in state.reports]  # whoever asked for them last may not have got them
        self._committed = retention.surviving(self._directory, resumption.directory)

    async def _one_step(self) -> None:
        """Take, learn, publish, and commit when it is due; or nothing of that, when `stop` comes first."""
        self._phases.begin()
        step = self._step
        await self._in_thread(partial(self._batches.begin, step))
        found = await self._learn_from_a_batch()
        if found is None:
            await self._in_thread(self._batches.undo)
            return
        batch, assembled, numbers = found
        reach("learner.step.after")
        feedback = Feedback(
            trained_tokens=assembled.tokens,
            masked_tokens=assembled.masked_tokens,
            reused_tokens=assembled.reused_tokens(batch.taken.uses),
            scores=assembled.scores,
        )
        self._phases.enter("publishing")
        self._version = await self._ask(
            "trained", lambda: self._queue.trained(step=step, epoch=self._epoch, feedback=feedback)
        )
        self._step += 1
        await self._publish()
        self._since_commit.append(assembled.reward)
        now: dict[str, Any] = {"step": self._step, "version": self._version, "weights": self._weights}
        report = partial(
            report_of, batch, assembled, numbers, self._phases, samples=self._config.samples_per_step, **now
        )
        if self._step % self._config.checkpoint_every == 0:
            await self._commit(report())
        self._phases.enter("waiting")
        self._reports.append(report())
        if self._on_step is not None:
            await self._on_step(self._reports[-1])

    async def _learn_from_a_batch(self) -> tuple[Batch, Assembled, StepNumbers] | None:
        """The step's batch, learnt from. Groups that cannot be leave it, and others take their places."""
        while (batch := await self._take()) is not None:
            assembled = await self._in_thread(partial(self._batches.assemble, batch))
            reach("learner.step.before")
            try:
                steps = await self._in_thread(partial(self._learn, batch, assembled))
            except Interrupted:
                return None
            for each in steps.refused:
                kind = "step skipped" if steps.numbers is None else "update skipped"
                self._tell(kind, self._step, str(each), groups=batch.named(each.places))
            if steps.numbers is not None:
                return batch, assembled, steps.numbers
            await self._give_back(self._batches.leave_out(batch, steps.refused))
        return None

    async def _take(self) -> Batch | None:
        """The batch of this step, shaped, without those that a rule filters; None when `stop` was called first."""
        step = self._step
        while not self._stopping:
            self._phases.enter("waiting")
            call = partial(self._queue.take, step=step, epoch=self._epoch, wait_s=TAKE_WAIT_S)
            taken = await self._unless_stopped(self._ask("take", call))
            if taken is None:
                continue
            self._phases.enter("computing")
            batch = await self._in_thread(partial(self._batches.judge, taken, self.policy, self._tokenizer))
            if not batch.leaving:
                return batch
            await self._give_back(batch)
        return None

    async def _give_back(self, batch: Batch) -> None:
        """The groups that a rule filters leave the step."""
        self._batches.refuse_to_filter_all(batch)
        out, step = batch.leaving, self._step
        await self._ask("filtered", lambda: self._queue.filtered(step=step, epoch=self._epoch, groups=out))

    def _learn(self, batch: Batch, assembled: Assembled) -> Steps:
        """All optimiser steps of the batch; then the reference follows."""
        steps = make_steps(
            self.policy,
            self.objective,
            self._optimiser,
            assembled.updates,
            passes=self._updates.epochs,
            name=lambda places: at_step(self._step, batch.named(places)),
            refuse_above=self._config.skip_gradient_above,
            interrupted=lambda: self._stopping and self._clock() - self._stopped_at_s > GRACE_S,
        )
        moves = steps.numbers is not None and self.policy.reference is not None
        if moves and (share := self.objective.reference_share(self._step + 1)):
            move(self.policy.reference, self.policy, share)
        return steps

    async def _publish(self) -> None:
        self._phases.enter("publishing")
        packed = await self._in_thread(
            lambda: self._publisher.packed(version=self._version, step=self._step, epoch=self._epoch)
        )
        manifest = await self._ask("publish", lambda: self._store.pour(packed))
        self._weights = manifest.digest
        await self._ask("announce", lambda: self._queue.announce(version=self._version, epoch=self._epoch))

    async def _commit(self, made: StepReport | None = None, *, last: bool = False) -> None:
        """Write a checkpoint and have the ledger point to it. Without room for it the run goes on to the next one.

        Args:
            made: the report of the step that was just made, as far as it is known.
        """
        self._phases.enter("committing")
        reports = self._reports[self._told :] + ([made] if made else [])
        reward = sum(self._since_commit) / len(self._since_commit)
        try:
            saved = await self._in_thread(partial(self._save, reward, reports))
        except DiskFullError as caught:
            if last:
                raise
            self._tell("checkpoint skipped", self._step, str(caught))
            return
        reach("learner.commit.before")
        await self._ask(
            "commit",
            lambda: self._queue.commit(
                step=self._step, directory=saved.directory, digest=saved.digest, epoch=self._epoch
            ),
        )
        reach("learner.commit.after")
        self._since_commit.clear()
        self._committed.append((saved.directory, reward))
        needed = (await self._ask("status", self._queue.status)).commits
        keep, epoch = self._config.checkpoint_keep, self._epoch
        self._committed = await self._in_thread(
            partial(retention.retain, self._directory, self._committed, keep=keep, needed=needed, epoch=epoch)
        )

    def _save(self, reward: float, reports: Sequence[StepReport]) -> Saved:
        state = LearnerState(
            step=self._step,
            version=self._version,
            epoch=self._epoch,
            seed=self._config.seed,
            reward=reward,
            memory=self._batches.saved(),
            reports=[to_plain(each) for each in reports],
        )
        parts = {"policy": self.policy, "tokenizer": self._tokenizer, "optimiser": self._optimiser}
        return checkpoint.save(self._directory, state, **parts)

    @property
    def _stopping(self) -> bool:
        return self._stopped.is_set()

    def _tell(self, kind: str, step: int, why: str, **more: Any) -> None:
        self._events.append({"kind": kind, "step": step, **more, "why": why})

    async def _unless_stopped(self, work: Coroutine[Any, Any, T]) -> T | None:
        """What it comes to; None when `stop` comes first: then it is given up, a thread under way left to itself."""
        task = asyncio.ensure_future(work)
        stopped = asyncio.ensure_future(self._stopped.wait())
        try:
            await asyncio.wait((task, stopped), return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() else None
        finally:
            for each in (task, stopped):
                each.cancel()

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def _ask(self, method: str, call: Callable[[], Awaitable[T]]) -> T:
        return await persist(
            call,
            what=f"learner, {method} of step {self._step}",
            remedy="The queue or the weight store does not answer: see events.jsonl, then resume the run.",
            deadline_s=self._config.queue_deadline_s,
            clock=self._clock,
        )
