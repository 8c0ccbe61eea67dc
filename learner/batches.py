"""What the learner makes of the recorded batch of a step: judged groups, those that leave it, an assembled batch.

A redone step sees the same groups in the same rounds: the ledger forgets which of them were filtered and fills the
batch from its record. So what has memory or draws random numbers gives the same again, to the bit.
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from millrace.core import schema
from millrace.core.errors import TrainingError
from millrace.core.protocols import Taken
from millrace.core.recipe import Updates
from millrace.core.types import Group, GroupId
from millrace.core.words import SCORED
from millrace.learner import checkpoint, prepass
from millrace.learner.assemble import Assembled, assemble
from millrace.learner.config import LearnerConfig
from millrace.learner.judged import Judged, Shaping, shape_all, texts_of
from millrace.learner.model import Policy
from millrace.learner.objective import Objective
from millrace.learner.step import Refused


class Batch(NamedTuple):
    """The groups of a step as they are now, and what was filtered for it so far, by rule."""

    taken: Taken
    groups: tuple[Judged, ...]
    filtered: Mapping[str, int]

    @property
    def leaving(self) -> dict[GroupId, str]:
        """Those that some rule filters."""
        return {each.group.id: each.rule for each in self.groups if each.rule}

    def named(self, places: Sequence[int]) -> list[str]:
        """Groups by id and prompt, for people."""
        return [named(self.groups[place].group) for place in places]


class Batches:
    """Shapes, filters and assembles batches; owns the memory of everything that has one.

    Args:
        config: of the learner.
        objective: of the recipe.
        shaping: likewise.
        updates: how often each batch is learnt from.
        max_tokens: the longest response that sampling allows.
        max_lag: above it tokens are masked in batches that say so.
    """

    def __init__(
        self,
        config: LearnerConfig,
        objective: Objective,
        shaping: Shaping,
        updates: Updates,
        *,
        max_tokens: int,
        max_lag: int | None,
    ) -> None:
        self._config, self._updates = config, updates
        self._max_tokens, self._max_lag = max_tokens, max_lag
        self.objective, self.shaping = objective, shaping
        self._step = 0
        self._judged: dict[GroupId, Judged] = {}  # of this step
        self._before: dict[str, Any] = {}  # the memory that this step begins with

    def begin(self, step: int) -> None:
        """A step begins: its random numbers depend on nothing that came before it."""
        torch_seed, numpy_seed, python_seed = np.random.SeedSequence((self._config.seed, step)).generate_state(3)
        torch.manual_seed(int(torch_seed))
        np.random.seed(int(numpy_seed))
        random.seed(int(python_seed))
        self._step = step
        self._judged.clear()
        self._before = self.memory()

    def undo(self) -> None:
        """The step will not be made: what it has left in any memory is forgotten; whoever resumes sees it again."""
        self.objective.restore(self._before["objective"])
        self.shaping.restore(self._before["shaping"])

    def judge(self, taken: Taken, policy: Policy, tokenizer: PreTrainedTokenizerBase) -> Batch:
        """The groups, shaped. Each is shaped once, in this order, so that methods with memory see it once."""
        groups = schema.decode(taken.pack)
        found = zip(groups, taken.verdicts, taken.lag, taken.uses or (0,) * len(groups), strict=True)
        fresh = [Judged.of(*each) for each in found if each[0].id not in self._judged]
        asked = self.shaping.words | self.objective.asks_of_groups
        words = (asked | (self.objective.scores_before if self._updates.per_batch > 1 else frozenset())) & SCORED
        scored = prepass.score(policy, fresh, words, token_budget=self._config.token_budget)
        decode = partial(texts_of, tokenizer)
        for each in shape_all(scored, self.shaping, step=self._step, max_tokens=self._max_tokens, decode=decode):
            self._judged[each.group.id] = each
        filtered = Counter(each.rule for each in self._judged.values() if each.rule)
        return Batch(taken, tuple(self._judged[group.id] for group in groups), dict(filtered))

    def assemble(self, batch: Batch) -> Assembled:
        """Its micro-batches, once no rule filters any of its groups."""
        return assemble(
            batch.groups,
            self.objective,
            token_budget=self._config.token_budget,
            mask_above=self._max_lag if batch.taken.masked else None,
            updates=self._updates,
            step=self._step,
            seed=self._config.seed,
        )

    def leave_out(self, batch: Batch, refused: Sequence[Refused]) -> Batch:
        """The batch after no optimiser step on it could be made: the groups at fault leave it.

        The objective forgets it; the shapers have seen its groups, and see none of them again.
        """
        self.objective.restore(self._before["objective"])
        for each in refused:
            for place in each.places:
                group = batch.groups[place]
                self._judged[group.group.id] = replace(group, rule=each.rule)
        filtered = Counter(each.rule for each in self._judged.values() if each.rule)
        return Batch(batch.taken, tuple(self._judged[each.group.id] for each in batch.groups), dict(filtered))

    def refuse_to_filter_all(self, batch: Batch) -> None:
        """
        Raises:
            TrainingError: so many groups left this step's batch that nothing will fill it.
        """
        size, many = len(batch.groups), sum(batch.filtered.values())
        if many <= self._config.max_filtered * size:
            return
        raise TrainingError(
            f"step {self._step}: {many} groups were filtered and its batch of {size} is not full"
            f" (max_filtered = {self._config.max_filtered} batches): {dict(batch.filtered)}. Loosen these filters, give"
            " prompts that the model answers rightly now and then, or raise learner.max_filtered; where the rule is"
            " non_finite or gradient, lower the learning rate and look at the groups in events.jsonl"
        )

    def memory(self) -> dict[str, Any]:
        """Of objective and shaping, for the checkpoint."""
        return {"objective": self.objective.memory(), "shaping": self.shaping.memory()}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Give it back.

        Raises:
            RecipeError: it is another recipe's.
        """
        self.objective.restore(saved.get("objective", {}))
        self.shaping.restore(saved.get("shaping", {}))

    def saved(self) -> dict[str, Any]:
        """The memory as a checkpoint keeps it; what goes on has it just so, as a resumed learner will.

        Raises:
            TrainingError: a method remembers what JSON cannot hold.
        """
        memory = checkpoint.plain(self.memory())
        self.restore(memory)
        return memory


def named(group: Group) -> str:
    """A group, for people.

    >>> from millrace.core.types import Prompt
    >>> prompt = Prompt(id="row:7", text="", tokens_P=np.zeros(1, np.int32))
    >>> named(Group(id=GroupId(3, 0), prompt=prompt, rollouts=(), lease_epoch=1))
    'draw 3 attempt 0 (prompt row:7)'
    """
    return f"{group.id} (prompt {group.prompt.id})"


def at_step(step: int, groups: Sequence[str]) -> str:
    """For messages: the step, and the first few groups.

    >>> at_step(2, list("abcdef"))
    'step 2: a, b, c, d and 2 more'
    """
    return f"step {step}: {', '.join(groups[:4])}{f' and {len(groups) - 4} more' if len(groups) > 4 else ''}"
