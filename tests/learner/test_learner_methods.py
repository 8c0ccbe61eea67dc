"""What a recipe makes of the learner's loop: shaping and filters, several steps on a batch, reuse, references."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from millrace.core.errors import RecipeError, TrainingError
from millrace.core.protocols import Resumption, Taken
from millrace.core.recipe import Updates
from millrace.core.types import GroupId
from millrace.learner.judged import Unshaped
from millrace.learner.table_model import TableForCausalLM
from tests.learner.table_loop import CONFIG, GRPO, LENGTH, TableQueue, make


def test_tokens_of_further_uses_are_told_apart(tmp_path, table_dir):
    learner, queue, _ = make(tmp_path, table_dir, steps=1)
    queue_make = queue.make

    async def reused(step: int) -> Taken:
        return replace(await queue_make(step), uses=[0, 2, 0, 1])

    queue.make = reused
    asyncio.run(learner.run())
    (feedback,) = queue.feedback
    assert (feedback.trained_tokens, feedback.reused_tokens) == (4 * 8 * LENGTH, 2 * 8 * LENGTH)


def test_filtered_groups_are_handed_back_and_the_rest_is_shaped_once(tmp_path, table_dir):
    shaping = Doubles()
    learner, queue, reports = make(tmp_path, table_dir, steps=1, shaping=lambda: shaping, max_tokens=LENGTH)
    asyncio.run(learner.run())
    assert "filtered 0 odd" in queue.calls
    assert shaping.shaped == 5, "four groups, and the one that took the place of the filtered one"
    assert reports[0].groups == 4 and reports[0].filtered == {"odd": 1}
    scores = [verdict.score for group in queue.batches[0].verdicts for verdict in group.verdicts]
    assert reports[0].reward == pytest.approx(2 * np.mean(scores), abs=1e-6)
    assert len(reports[0].samples) == 4


class Doubles(Unshaped):
    """Doubles rewards, and filters the second group it sees."""

    words = frozenset({"text_G"})

    def __init__(self) -> None:
        self.shaped = 0

    def shape(self, have):
        assert len(have["text_G"]) == len(have["reward_G"]) and have["max_tokens"] == LENGTH and have["step"] == 0
        self.shaped += 1
        return have["reward_G"] * 2

    def keep(self, have):
        return "odd" if self.shaped == 2 else ""


def test_a_batch_that_was_only_begun_leaves_nothing_in_the_memory_of_the_commit(tmp_path, table_dir):
    """Whoever resumes is given its groups again."""
    shaping = Counts()
    learner, queue, _ = make(tmp_path, table_dir, shaping=lambda: shaping)

    async def stopped_meanwhile(*, step: int, epoch: int, groups: dict[GroupId, str]) -> None:
        assert step == 1 and shaping.shaped == 8
        await learner.stop()

    queue.filtered = stopped_meanwhile
    asyncio.run(learner.run())
    ((step, directory, _),) = queue.commits
    memory = json.loads((Path(directory) / "learner" / "state.json").read_text())["memory"]
    assert (step, memory["shaping"]) == (1, {"shaped": 4})


class Counts(Unshaped):
    """Remembers how many groups it has shaped, and filters the sixth."""

    def __init__(self) -> None:
        self.shaped = 0

    def shape(self, have):
        self.shaped += 1
        return have["reward_G"]

    def keep(self, have):
        return "sixth" if self.shaped == 6 else ""

    def memory(self):
        return {"shaped": self.shaped}

    def restore(self, saved):
        self.shaped = saved["shaped"]


def test_filters_that_leave_nothing_end_the_run_with_their_names(tmp_path, table_dir):
    class Nothing(Unshaped):
        def keep(self, have):
            return "never"

    learner, _, _ = make(tmp_path, table_dir, shaping=Nothing, max_filtered=3)
    with pytest.raises(TrainingError, match=r"step 0: 16 groups were filtered and its batch of 4 is not full .*never"):
        asyncio.run(learner.run())


def test_several_steps_on_a_batch_have_one_version_and_the_policy_before_them_as_proximal(tmp_path, table_dir):
    objective = {**GRPO, "surrogate": {"name": "clip", "low": 1e-3, "high": 1e-3}}
    learner, queue, reports = make(
        tmp_path, table_dir, objective=objective, steps=3, updates=Updates(epochs=3, minibatches=2)
    )
    asyncio.run(learner.run())
    assert queue.announced == [0, 1, 2, 3]
    assert learner._optimiser.steps == 18
    for report in reports:
        assert report.numbers.metrics["clipped"] > 0.2, "later steps leave so narrow a range around the first's policy"
        assert sum(lag.tokens for lag in report.numbers.by_lag.values()) == report.tokens
    once, _, alone = make(tmp_path / "once", table_dir, objective=objective, steps=3)
    asyncio.run(once.run())
    assert all(report.numbers.metrics["clipped"] == 0 for report in alone), "one step is made where the ratio is 1"


def test_the_gap_to_the_sampler_is_that_before_the_first_of_several_steps(tmp_path, table_dir):
    """Also where no forward pass of its own scores the policy as it was then."""
    objective = {**GRPO, "ratio": "behaviour", "corrections": []}
    updates = Updates(epochs=2, minibatches=2)
    learner, _, reports = make(tmp_path, table_dir, objective=objective, steps=3, updates=updates)
    asyncio.run(learner.run())
    assert learner._optimiser.steps == 12
    for report in reports:
        assert list(report.numbers.by_lag) == [0] and report.numbers.by_lag[0].tokens >= report.tokens / 4
        assert report.numbers.by_lag[0].max_gap < 1e-5
        assert report.numbers.metrics["behaviour_kl"] < 1e-10 and report.numbers.metrics["clipped"] > 0


@pytest.mark.parametrize(
    ("reference", "expected"), [("frozen", 0.0), ({"name": "ema", "decay": 0.5}, 0.5), ("snapshot", 0.0)]
)
def test_a_reference_follows_the_policy_as_the_recipe_says(tmp_path, table_dir, reference, expected):
    objective = {**GRPO, "penalties": [{"name": "k3", "coefficient": 1e-6}], "reference": reference}
    learner, _, _ = make(tmp_path, table_dir, objective=objective, reference=table_dir, steps=1)
    before = TableForCausalLM.from_pretrained(table_dir).table.detach()
    asyncio.run(learner.run())
    moved = (learner.policy.model.table - before).detach()
    followed = (learner.policy.reference.table - before).detach()
    assert moved.abs().max() > 0.01
    torch.testing.assert_close(followed, expected * moved)


def test_a_reference_that_moves_is_resumed_where_it_was(tmp_path, table_dir):
    objective = {**GRPO, "penalties": [{"name": "k3", "coefficient": 0.1}], "reference": {"name": "ema", "decay": 0.7}}
    kwargs = {
        "objective": objective,
        "reference": table_dir,
        "config": CONFIG.model_copy(update={"checkpoint_keep": 2}),
    }
    whole, _, _ = make(tmp_path / "whole", table_dir, steps=8, **kwargs)
    asyncio.run(whole.run())
    learner, queue, _ = make(tmp_path / "cut", table_dir, steps=7, **kwargs)
    asyncio.run(learner.run())
    step, directory, digest = queue.commits[0]
    again = TableQueue(queue.store)
    again.batches = dict(queue.batches)
    again.resumption = Resumption(epoch=2, step=step, version=20, directory=directory, digest=digest)
    learner, _, _ = make(tmp_path / "cut", table_dir, store=queue.store, queue=again, steps=8, **kwargs)
    asyncio.run(learner.run())
    assert torch.equal(learner.policy.reference.table, whole.policy.reference.table)
    assert not torch.equal(whole.policy.reference.table, whole.policy.model.table)


def test_a_penalty_that_needs_a_reference_gets_one_or_is_refused_at_once(tmp_path, table_dir):
    objective = {**GRPO, "penalties": [{"name": "k3", "coefficient": 100.0}]}
    with pytest.raises(
        RecipeError, match=r"asks for reference_logprob_N: give the run a reference model, reference = "
    ):
        make(tmp_path, table_dir, objective=objective)
    learner, _, reports = make(tmp_path, table_dir, objective=objective, reference=table_dir, steps=12)
    asyncio.run(learner.run())
    assert reports[-1].reward < 0.5, "the penalty holds the policy at its reference, where it would learn"
    assert reports[-1].skipped_groups == 0
