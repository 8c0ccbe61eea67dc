"""Learner: takes the batch of a step, learns, publishes, commits.

    consumes      batches of judged groups (`take`), in the order the ledger recorded
    waits for     a full batch, and nothing else
    unblocked by  reward workers that put verdicts

It begins with the last commit, whose version it publishes and announces before the first batch. Everything that
computes runs on one thread of its own, so that the event loop answers `status` while a step is under way.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch

from millrace.core import schema
from millrace.core.calls import persist
from millrace.core.errors import LedgerError, TrainingError
from millrace.core.protocols import Clock, Feedback, Queue, Resumption, Taken, WeightStore
from millrace.core.recipe import ObjectiveConfig, Updates
from millrace.core.types import Group, GroupId
from millrace.core.words import SCORED
from millrace.learner import checkpoint, prepass
from millrace.learner.assemble import Assembled, assemble
from millrace.learner.checkpoint import LearnerState, Saved
from millrace.learner.config import LearnerConfig
from millrace.learner.judged import Judged, Shaping, Unshaped, shape_all, texts_of
from millrace.learner.loading import load_policy
from millrace.learner.model import load_tokenizer
from millrace.learner.objective import Objective
from millrace.learner.optimiser import Optimiser
from millrace.learner.publish import Publisher
from millrace.learner.reference import move
from millrace.learner.report import LearnerStatus, StepReport
from millrace.learner.samples import pick
from millrace.learner.step import StepNumbers, make_steps

T = TypeVar("T")

TAKE_WAIT_S = 2.0  # how long one `take` waits; `stop` is noticed within it


class Batch(NamedTuple):
    """The groups of a step as they are now, and what was filtered for it so far, by rule."""

    taken: Taken
    groups: tuple[Judged, ...]
    filtered: Mapping[str, int]


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
        self._max_lag = max_lag
        self._shaping = shaping()
        self._updates = updates or Updates()
        self._max_tokens = max_tokens
        self._memories: dict[str, Objective | Shaping] = {"objective": self.objective, "shaping": self._shaping}
        self._on_step = on_step
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="learner")
        self._stopping = False
        self._phase, self._phase_began = "loading", clock()
        self._step = 0
        self._version = -1
        self._epoch = 0
        self._committed: list[tuple[str, float]] = []  # directory, mean reward
        self._since_commit: list[float] = []  # mean reward of each step
        self._reports: list[StepReport] = []
        self._judged: dict[GroupId, Judged] = {}  # of this step
        self._spent: dict[str, float] = {}

    async def run(self) -> None:
        """Join, resume, publish; then take, learn, publish, commit, until the end.

        Raises:
            ModelError: the model or its tokenizer will not do.
            TrainingError: a step cannot be made; what was committed stays.
            Fenced: another learner has joined.
        """
        resumption = await self._ask("join_learner", self._queue.join_learner)
        try:
            await self._in_thread(lambda: self._open(resumption))
            self._step, self._version, self._epoch = resumption.step, resumption.version, resumption.epoch
            await self._publish()
            while not self._stopping and (self._steps is None or self._step < self._steps):
                await self._one_step()
            if self._since_commit:
                await self._commit()
        finally:
            self._enter("stopped")
            self._thread.shutdown(wait=False)

    async def stop(self) -> None:
        """Finish the step under way, commit, and return from `run`."""
        self._stopping = True

    async def status(self) -> LearnerStatus:
        """What it does, and since when. Answered while a step is computed."""
        return LearnerStatus(
            phase=self._phase,
            phase_s=self._clock() - self._phase_began,
            step=self._step,
            version=self._version,
        )

    async def reports(self, *, after: int) -> Sequence[StepReport]:
        """Of all steps that this incarnation made but the first `after`, whose rollouts are then forgotten."""
        for at in range(after - 1, -1, -1):
            if not self._reports[at].samples:
                break
            self._reports[at] = replace(self._reports[at], samples=())
        return self._reports[after:]

    async def checkpoint(self) -> str | None:
        """The directory of the last commit; None before the first."""
        return self._committed[-1][0] if self._committed else None

    def _open(self, resumption: Resumption) -> None:
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
        self._publisher = Publisher(self.policy, dtype=self._config.publish_dtype, probe_every=self._config.probe_every)

    def _restore(self, resumption: Resumption) -> None:
        assert resumption.directory is not None
        state = checkpoint.load(resumption.directory, resumption.digest, policy=self.policy, optimiser=self._optimiser)
        if state.step != resumption.step:
            raise LedgerError(
                f"checkpoint {resumption.directory} was written after step {state.step}, the ledger resumes at step"
                f" {resumption.step}: they are of different runs; give the run its own checkpoint directory"
            )
        for name, memory in self._memories.items():
            memory.restore(state.memory.get(name, {}))
        self._committed = checkpoint.surviving(self._directory, resumption.directory)

    async def _one_step(self) -> None:
        began = self._phase_began = self._clock()
        self._spent = {"waiting": 0.0, "computing": 0.0, "publishing": 0.0, "committing": 0.0}
        found = await self._take()
        if found is None:
            return
        batch, assembled = found
        self._enter("computing")
        numbers = await self._in_thread(
            lambda: self._learn(
                assembled, name=lambda places: _named(self._step, [batch.groups[place].group for place in places])
            )
        )
        feedback = Feedback(
            trained_tokens=assembled.tokens,
            masked_tokens=assembled.masked_tokens,
            reused_tokens=assembled.reused_tokens(batch.taken.uses),
            scores=assembled.scores,
        )
        self._enter("publishing")
        step = self._step
        self._version = await self._ask(
            "trained", lambda: self._queue.trained(step=step, epoch=self._epoch, feedback=feedback)
        )
        self._step += 1
        await self._publish()
        self._since_commit.append(assembled.reward)
        if self._step % self._config.checkpoint_every == 0:
            await self._commit()
        self._enter("waiting")
        self._reports.append(self._report(batch, assembled, numbers, self._clock() - began))
        if self._on_step is not None:
            await self._on_step(self._reports[-1])

    async def _take(self) -> tuple[Batch, Assembled] | None:
        """The batch of this step, shaped and filtered; None when `stop` was called first."""
        self._enter("waiting")
        self._judged.clear()
        remembered = self._shaping.memory()
        step = self._step
        while not self._stopping:
            taken = await self._ask("take", partial(self._queue.take, step=step, epoch=self._epoch, wait_s=TAKE_WAIT_S))
            if taken is None:
                continue
            self._enter("computing")
            batch = await self._in_thread(partial(self._judge, taken))
            out = {each.group.id: each.rule for each in batch.groups if each.rule}
            if not out:
                return batch, await self._in_thread(partial(self._assemble, batch))
            self._refuse_to_filter_all(len(batch.groups), batch.filtered)
            await self._ask("filtered", partial(self._queue.filtered, step=step, epoch=self._epoch, groups=out))
            self._enter("waiting")
        self._shaping.restore(remembered)  # what was judged so far is judged again, by whoever resumes
        return None

    def _judge(self, taken: Taken) -> Batch:
        """The groups, shaped. Each is shaped once, in this order, so that methods with memory see it once."""
        groups = schema.decode(taken.pack)
        found = zip(groups, taken.verdicts, taken.lag, taken.uses or (0,) * len(groups), strict=True)
        fresh = [Judged.of(*each) for each in found if each[0].id not in self._judged]
        asked = self._shaping.words | self.objective.asks_of_groups
        words = (asked | (self.objective.scores_before if self._updates.per_batch > 1 else frozenset())) & SCORED
        scored = prepass.score(self.policy, fresh, words, token_budget=self._config.token_budget)
        decode = partial(texts_of, self._tokenizer)
        for each in shape_all(scored, self._shaping, step=self._step, max_tokens=self._max_tokens, decode=decode):
            self._judged[each.group.id] = each
        filtered = Counter(each.rule for each in self._judged.values() if each.rule)
        return Batch(taken, tuple(self._judged[group.id] for group in groups), dict(filtered))

    def _refuse_to_filter_all(self, size: int, filtered: Mapping[str, int]) -> None:
        if sum(filtered.values()) <= self._config.max_filtered * size:
            return
        raise TrainingError(
            f"step {self._step}: {sum(filtered.values())} groups were filtered and its batch of {size} is not full"
            f" (max_filtered = {self._config.max_filtered} batches): {dict(filtered)}. Loosen these filters, give"
            " prompts that the model answers rightly now and then, or raise learner.max_filtered"
        )

    def _assemble(self, batch: Batch) -> Assembled:
        return assemble(
            batch.groups,
            self.objective,
            token_budget=self._config.token_budget,
            mask_above=self._max_lag if batch.taken.masked else None,
            updates=self._updates,
            step=self._step,
            seed=self._config.seed,
        )

    def _learn(self, assembled: Assembled, *, name: Callable[[Sequence[int]], str]) -> StepNumbers:
        """All optimiser steps of the batch; then the reference follows."""
        numbers = make_steps(
            self.policy, self.objective, self._optimiser, assembled.updates, passes=self._updates.epochs, name=name
        )
        if self.policy.reference is not None and (share := self.objective.reference_share(self._step + 1)):
            move(self.policy.reference, self.policy, share)
        return numbers

    async def _publish(self) -> None:
        self._enter("publishing")
        manifest, buffer = await self._in_thread(
            lambda: self._publisher.pack(version=self._version, step=self._step, epoch=self._epoch)
        )
        await self._ask("publish", lambda: self._store.publish(manifest, buffer))
        await self._ask("announce", lambda: self._queue.announce(version=self._version, epoch=self._epoch))

    async def _commit(self) -> None:
        self._enter("committing")
        reward = sum(self._since_commit) / len(self._since_commit)
        saved = await self._in_thread(lambda: self._save(reward))
        await self._ask(
            "commit",
            lambda: self._queue.commit(
                step=self._step, directory=saved.directory, digest=saved.digest, epoch=self._epoch
            ),
        )
        self._since_commit.clear()
        self._committed.append((saved.directory, reward))
        self._committed = await self._in_thread(
            lambda: checkpoint.retain(self._directory, self._committed, keep=self._config.checkpoint_keep)
        )

    def _save(self, reward: float) -> Saved:
        state = LearnerState(
            step=self._step,
            version=self._version,
            epoch=self._epoch,
            seed=self._config.seed,
            reward=reward,
            memory={name: memory.memory() for name, memory in self._memories.items()},
        )
        return checkpoint.save(
            self._directory,
            state,
            policy=self.policy,
            tokenizer=self._tokenizer,
            optimiser=self._optimiser,
        )

    def _report(self, batch: Batch, assembled: Assembled, numbers: StepNumbers, step_s: float) -> StepReport:
        spent = self._spent
        groups = [each.group for each in batch.groups]
        return StepReport(
            step=self._step,
            version=self._version,
            numbers=numbers,
            groups=len(groups),
            rollouts=sum(len(group.rollouts) for group in groups),
            reward=assembled.reward,
            reward_std=assembled.reward_std,
            length=assembled.length,
            tokens=assembled.tokens,
            masked_tokens=assembled.masked_tokens,
            invalid_rollouts=assembled.invalid,
            skipped_groups=assembled.skipped_groups,
            filtered=batch.filtered,
            rows=assembled.rows,
            unpacked_rows=assembled.unpacked_rows,
            padding_share=assembled.padding_share,
            wait_s=spent["waiting"],
            compute_s=spent["computing"],
            publish_s=spent["publishing"],
            checkpoint_s=spent["committing"],
            other_s=step_s - sum(spent.values()),
            step_s=step_s,
            samples=pick(
                groups,
                batch.taken.verdicts,
                [each.reward_G for each in batch.groups],
                batch.taken.lag,
                step=self._step,
                limit=self._config.samples_per_step,
                advantages=assembled.advantages,
            ),
        )

    def _enter(self, phase: str) -> None:
        """The time since the last change was spent on the phase that ends now."""
        now = self._clock()
        if self._phase in self._spent:
            self._spent[self._phase] += now - self._phase_began
        self._phase, self._phase_began = phase, now

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


def _named(step: int, groups: Sequence[Group]) -> str:
    """For messages: the step, and the groups by id and prompt."""
    shown = ", ".join(f"{group.id} (prompt {group.prompt.id})" for group in groups[:4])
    return f"step {step}: {shown}{f' and {len(groups) - 4} more' if len(groups) > 4 else ''}"
