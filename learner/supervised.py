"""Maximum likelihood of given answers: warm starts, and the recipe `sft` on rows that are there already."""

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from millrace.core.errors import DataError, RecipeError
from millrace.core.protocols import Clock
from millrace.core.recipe import ObjectiveConfig
from millrace.core.types import Prompt
from millrace.learner.assemble import Sample, pack, split, weigh
from millrace.learner.checkpoint import save_model
from millrace.learner.config import SupervisedConfig
from millrace.learner.loading import load_policy
from millrace.learner.objective import Objective
from millrace.learner.optimiser import Optimiser
from millrace.learner.report import StepNumbers, SupervisedResult
from millrace.learner.step import make_step
from millrace.learner.tokenizer import load_tokenizer


def train_supervised(
    model: str,
    rows: Sequence[Prompt],
    directory: str,
    config: SupervisedConfig,
    *,
    objective: ObjectiveConfig | Mapping[str, Any] | None = None,
    on_step: Callable[[int, StepNumbers], bool | None] | None = None,
    clock: Clock = time.monotonic,
) -> SupervisedResult:
    """Train a model on prompts with answers and save it with its tokenizer.

    Args:
        model: directory or hub id.
        rows: prompts as tokenised when loaded; their answers are tokenised here and end with the end-of-sequence token.
        directory: where the trained model goes.
        config: sizes and the optimiser.
        objective: a whole loss; None: negative log-likelihood, every token weighing the same.
        on_step: called after each step with their count and the step's numbers; True ends the training there.
        clock: monotonic seconds.
    Raises:
        DataError: no rows, a row without an answer, or one longer than the model's context.
        RecipeError: the objective asks for rewards.
        ModelError: the model or its tokenizer will not do.
        TrainingError: a loss or gradient is not finite.
    """
    began = clock()
    composed = Objective.of(objective or {"loss": "nll"})
    if composed.learns_from_rewards:
        raise RecipeError("supervised training has no rewards; give it a whole loss, such as objective = 'nll'")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    tokenizer = load_tokenizer(model)
    policy = load_policy(model, config)
    samples = _samples(rows, tokenizer, policy.context)
    optimiser = Optimiser(policy.model.named_parameters(), config)
    losses: list[float] = []
    tokens = seen = 0
    for batch in _batches(samples, config):
        weigh(batch, composed)
        microbatches = [pack(part) for part in split(batch, config.token_budget)]
        numbers = make_step(policy, composed, optimiser, microbatches, name=lambda places: _named(places, rows))
        losses.append(numbers.loss)
        tokens += sum(len(micro.token_N) for micro in microbatches)
        seen += len(batch)
        if on_step is not None and on_step(len(losses), numbers):
            break
    save_model(Path(directory), policy, tokenizer)
    return SupervisedResult(
        directory=directory,
        steps=len(losses),
        rows=seen,
        tokens=tokens,
        first_loss=losses[0],
        last_loss=losses[-1],
        seconds=clock() - began,
    )


def _samples(rows: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, context: int | None) -> list[Sample]:
    if not rows:
        raise DataError("supervised training was given no rows; it needs prompts with answers")
    return [_sample(place, row, tokenizer, context) for place, row in enumerate(rows)]


def _sample(place: int, row: Prompt, tokenizer: PreTrainedTokenizerBase, context: int | None) -> Sample:
    if row.answer is None:
        raise DataError(f"row {row.id} has no answer; supervised training needs one in every row")
    ids = [*tokenizer(row.answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    token_T = np.array(ids, np.int32)
    if context is not None and len(row.tokens_P) + len(token_T) > context:
        raise DataError(
            f"row {row.id}: {len(row.tokens_P)} tokens of prompt and {len(token_T)} of answer exceed the model's"
            f" context of {context}; shorten or leave out the row"
        )
    return Sample(
        group=place,
        prompt_P=row.tokens_P,
        token_T=token_T,
        behaviour_logprob_T=None,
        lag_T=np.zeros(len(token_T), np.int32),
        place_N=np.arange(len(token_T)),
    )


def _batches(samples: Sequence[Sample], config: SupervisedConfig) -> Iterator[list[Sample]]:
    for epoch in range(config.epochs):
        order = np.random.default_rng((config.seed, epoch)).permutation(len(samples))
        for start in range(0, len(order), config.batch_rows):
            yield [samples[place] for place in order[start : start + config.batch_rows]]


def _named(places: Sequence[int], rows: Sequence[Prompt]) -> str:
    return f"rows {', '.join(rows[place].id for place in places[:4])}{', ...' if len(places) > 4 else ''}"


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
        self._stopping = False

    async def run(self) -> SupervisedResult:
        return await asyncio.to_thread(
            train_supervised,
            *self._arguments,
            objective=self._objective,
            on_step=self._after,
        )

    def _after(self, _: int, numbers: StepNumbers) -> bool:
        self._losses.append(numbers)
        return self._stopping

    async def stop(self) -> None:
        """Finish the step under way, save, and return from `run`."""
        self._stopping = True

    async def losses(self, *, after: int) -> Sequence[StepNumbers]:
        """The numbers of all steps but the first `after`."""
        return self._losses[after:]
