"""The learner's loop on a table, against an in-process queue."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from millrace.core import schema
from millrace.core.errors import RecipeError, TrainingError
from millrace.core.protocols import Feedback, Manifest, Resumption, Taken
from millrace.core.recipe import Updates
from millrace.core.types import Group, GroupId, GroupVerdict, Prompt, Rollout, Verdict, VerdictKind, VersionRun
from millrace.core.weight_store import FileWeightStore
from millrace.core.weights import views
from millrace.learner.config import LearnerConfig
from millrace.learner.judged import Unshaped
from millrace.learner.learner import Learner
from millrace.learner.report import StepReport
from millrace.learner.table_model import TableConfig, TableForCausalLM

VOCABULARY, LENGTH = 6, 3
GRPO = {"advantage": "grpo", "surrogate": "clip", "corrections": ["truncated_importance"]}


class TableQueue:
    """Samples its batches from the published table: the reward is the share of tokens equal to 5."""

    def __init__(self, store: FileWeightStore, *, groups: int = 4, members: int = 8) -> None:
        self.store, self.groups, self.members = store, groups, members
        self.calls: list[str] = []
        self.resumption = Resumption(epoch=1, step=0, version=0)
        self.batches: dict[int, Taken] = {}
        self.feedback: list[Feedback] = []
        self.announced: list[int] = []
        self.commits: list[tuple[int, str, str]] = []
        self.versions = 0
        self.lag = 0
        self.poison: set[int] = set()
        self.hold = asyncio.Event()
        self.hold.set()

    async def join_learner(self) -> Resumption:
        self.calls.append("join")
        return self.resumption

    async def take(self, *, step: int, epoch: int, wait_s: float) -> Taken | None:
        self.calls.append(f"take {step}")
        await self.hold.wait()
        if self.calls.count(f"take {step}") == 1 and step == 0:
            return None  # a wait that ends empty-handed
        if step not in self.batches:
            self.batches[step] = await self.make(step)
        return self.batches[step]

    async def make(self, step: int) -> Taken:
        handle = await self.store.fetch(self.announced[-1])
        table = views(handle)["table"]
        version = handle.manifest.version
        rng = np.random.default_rng(step)
        groups = [self.group(step * self.groups + g, table, version, rng) for g in range(self.groups)]
        return Taken(
            step=step,
            pack=schema.encode(groups),
            verdicts=[self.judge(group) for group in groups],
            lag=[[self.lag] * self.members for _ in groups],
        )

    def group(self, draw: int, table: np.ndarray, version: int, rng: np.random.Generator) -> Group:
        prompt = np.array([1 + draw % 3], np.int32)
        rollouts = []
        for member in range(self.members):
            tokens, logprobs, last = [], [], int(prompt[-1])
            for place in range(LENGTH):
                z = table[last, min(place, table.shape[1] - 1)].astype(np.float64)
                p = np.exp(z - z.max())
                p /= p.sum()
                last = int(rng.choice(VOCABULARY, p=p))
                tokens.append(last)
                logprobs.append(np.log(p[last]))
            logprob_T = np.array(logprobs, np.float32)
            if draw in self.poison:
                logprob_T[0] = np.nan
            rollouts.append(
                Rollout(
                    tokens_T=np.array(tokens, np.int32),
                    sampled_T=np.ones(LENGTH, np.bool_),
                    behaviour_logprob_T=logprob_T,
                    versions=(VersionRun(version, 0, LENGTH),),
                    finish_reason="length",
                    seed=member,
                )
            )
        return Group(
            id=GroupId(draw, 0),
            prompt=Prompt(id=f"row:{draw % 3}", text="", tokens_P=prompt),
            rollouts=tuple(rollouts),
            lease_epoch=1,
        )

    def judge(self, group: Group) -> GroupVerdict:
        scores = [float((rollout.tokens_T == 5).mean()) for rollout in group.rollouts]
        return GroupVerdict(
            id=group.id, verdicts=tuple(Verdict(kind=VerdictKind.SCORED, score=score) for score in scores)
        )

    async def filtered(self, *, step: int, epoch: int, groups: dict[GroupId, str]) -> None:
        self.calls.append(f"filtered {step} " + ",".join(sorted(set(groups.values()))))
        kept = [g for g in schema.decode(self.batches[step].pack) if g.id not in groups]
        handle = await self.store.fetch(self.announced[-1])
        rng = np.random.default_rng(99)
        fresh = [
            self.group(1000 * len(self.calls) + i, views(handle)["table"], handle.manifest.version, rng)
            for i in range(self.groups - len(kept))
        ]
        every = [*kept, *fresh]
        self.batches[step] = replace(
            self.batches[step], pack=schema.encode(every), verdicts=[self.judge(g) for g in every]
        )

    async def trained(self, *, step: int, epoch: int, feedback: Feedback) -> int:
        self.calls.append(f"trained {step}")
        self.feedback.append(feedback)
        self.versions += 1
        return self.resumption.version + self.versions

    async def announce(self, *, version: int, epoch: int) -> None:
        self.calls.append(f"announce {version}")
        assert (await self.store.fetch(version)).manifest.version == version, "announced before it was published"
        self.announced.append(version)

    async def commit(self, *, step: int, directory: str, digest: str, epoch: int) -> None:
        self.calls.append(f"commit {step}")
        assert Path(directory).is_dir()
        self.commits.append((step, directory, digest))


@pytest.fixture
def table_dir(model_dir) -> str:
    return model_dir(TableForCausalLM(TableConfig(vocab_size=VOCABULARY, positions=LENGTH, eos_token_id=2)))


CONFIG = LearnerConfig(
    learning_rate=0.3,
    checkpoint_every=5,
    checkpoint_keep=1,
    token_budget=60,
    threads=1,
    device="cpu",
    probe_every=3,
    queue_deadline_s=2.0,
)


def make(tmp_path, table_dir, *, store=None, queue=None, config=CONFIG, max_filtered=100, **kwargs):
    config = config.model_copy(update={"max_filtered": max_filtered})
    store = store or FileWeightStore(str(tmp_path / "weights"))
    queue = queue or TableQueue(store)
    reports: list[StepReport] = []

    async def on_step(report: StepReport) -> None:
        reports.append(report)

    arguments = {"model": table_dir, "objective": GRPO, "steps": 6, "on_step": on_step, **kwargs}
    learner = Learner(config, queue=queue, store=store, directory=str(tmp_path / "checkpoints"), **arguments)
    return learner, queue, reports


def test_it_learns_and_speaks_to_the_queue_in_order(tmp_path, table_dir):
    learner, queue, reports = make(tmp_path, table_dir, steps=30)
    asyncio.run(learner.run())
    assert reports[0].reward < 0.35 < 0.9 < reports[-1].reward
    assert queue.calls[:7] == ["join", "announce 0", "take 0", "take 0", "trained 0", "announce 1", "take 1"]
    assert [step for step, _, _ in queue.commits] == [5, 10, 15, 20, 25, 30]
    assert [report.step for report in reports] == list(range(1, 31))
    assert [report.version for report in reports] == list(range(1, 31))
    assert asyncio.run(learner.reports(after=28)) == reports[28:]
    assert asyncio.run(learner.checkpoint()) == queue.commits[-1][1]


def test_a_step_reports_what_it_did_and_where_its_time_went(tmp_path, table_dir):
    learner, queue, reports = make(tmp_path, table_dir, steps=1)
    asyncio.run(learner.run())
    (report,) = reports
    assert (report.groups, report.rollouts, report.tokens) == (4, 32, 4 * 8 * LENGTH)
    assert report.length == LENGTH and 0 < report.reward_std < 1
    assert list(report.numbers.by_lag) == [0]
    fresh = report.numbers.by_lag[0]
    assert fresh.max_gap < 1e-5 and abs(fresh.k3) < 1e-10 and fresh.clip_fraction == 0
    assert fresh.effective_sample_size == pytest.approx(1)
    assert report.numbers.gradient_norm > 0 and report.numbers.entropy == pytest.approx(np.log(VOCABULARY))
    parts = report.wait_s + report.compute_s + report.publish_s + report.checkpoint_s + report.other_s
    assert parts == pytest.approx(report.step_s)
    assert min(report.wait_s, report.compute_s, report.publish_s) > 0
    (feedback,) = queue.feedback
    assert feedback.trained_tokens == report.tokens and set(feedback.scores) == {"row:0", "row:1", "row:2"}


def test_tokens_of_further_uses_are_told_apart(tmp_path, table_dir):
    learner, queue, _ = make(tmp_path, table_dir, steps=1)
    queue_make = queue.make

    async def reused(step: int) -> Taken:
        return replace(await queue_make(step), uses=[0, 2, 0, 1])

    queue.make = reused
    asyncio.run(learner.run())
    (feedback,) = queue.feedback
    assert (feedback.trained_tokens, feedback.reused_tokens) == (4 * 8 * LENGTH, 2 * 8 * LENGTH)


def test_the_published_table_carries_probes_when_due(tmp_path, table_dir):
    store = FileWeightStore(str(tmp_path / "weights"), keep=10)
    learner, _, _ = make(tmp_path, table_dir, store=store, queue=TableQueue(store), steps=4)
    asyncio.run(learner.run())
    manifests: list[Manifest] = [asyncio.run(store.fetch(version)).manifest for version in range(5)]
    assert [bool(m.probes) for m in manifests] == [True, False, False, True, False]
    assert [(m.step, m.epoch) for m in manifests] == [(step, 1) for step in range(5)]
    table = views(asyncio.run(store.fetch(3)))["table"].astype(np.float64)
    probe = manifests[3].probes[0]
    places = np.minimum(np.arange(len(probe.tokens_T) - 1), LENGTH - 1)
    logits = table[probe.tokens_T[:-1], places]
    expected = logits[np.arange(len(places)), probe.tokens_T[1:]] - np.log(np.exp(logits).sum(1))
    np.testing.assert_allclose(probe.logprob_T, expected, atol=1e-5)


def weights_after(tmp_path: Path, table_dir: str, steps: int) -> np.ndarray:
    learner, _, _ = make(tmp_path, table_dir, steps=steps)
    asyncio.run(learner.run())
    return learner.policy.model.table.detach().numpy().copy()


def test_the_same_batches_and_seed_give_the_same_bits(tmp_path, table_dir):
    first = weights_after(tmp_path / "a", table_dir, 4)
    second = weights_after(tmp_path / "b", table_dir, 4)
    assert np.array_equal(first, second)


def test_a_resumed_learner_redoes_the_recorded_batches_to_the_bit(tmp_path, table_dir):
    whole = weights_after(tmp_path / "whole", table_dir, 8)
    config = CONFIG.model_copy(update={"checkpoint_keep": 2})
    learner, queue, _ = make(tmp_path / "cut", table_dir, steps=7, config=config)
    asyncio.run(learner.run())
    step, directory, digest = queue.commits[0]
    assert step == 5
    again = TableQueue(queue.store)
    again.batches = dict(queue.batches)
    again.resumption = Resumption(epoch=2, step=5, version=20, directory=directory, digest=digest)
    learner, _, reports = make(tmp_path / "cut", table_dir, store=queue.store, queue=again, steps=8, config=config)
    asyncio.run(learner.run())
    assert [report.step for report in reports] == [6, 7, 8]
    assert np.array_equal(learner.policy.model.table.detach().numpy(), whole)
    assert again.calls[:2] == ["join", "announce 20"]
    left = sorted(path.name for path in (tmp_path / "cut" / "checkpoints").iterdir())
    assert left == ["step_5.1", "step_8.2"], "step 7 of the first incarnation is nobody's"


def test_stop_ends_after_the_step_and_commits(tmp_path, table_dir):
    async def scenario() -> tuple[list[str], list[tuple[int, str, str]]]:
        learner, queue, reports = make(tmp_path, table_dir, steps=None)
        run = asyncio.create_task(learner.run())
        while len(reports) < 3:
            await asyncio.sleep(0.001)
        await learner.stop()
        await run
        return queue.calls, queue.commits

    calls, commits = asyncio.run(scenario())
    made = sum(call.startswith("trained") for call in calls)
    assert made >= 3 and commits[-1][0] == made


def test_status_is_answered_while_it_waits_and_while_it_computes(tmp_path, table_dir, monkeypatch):
    async def scenario() -> set[str]:
        learner, queue, _ = make(tmp_path, table_dir, steps=2)
        phases = set()
        queue.hold.clear()
        run = asyncio.create_task(learner.run())
        while not run.done():
            status = await learner.status()
            phases.add(status.phase)
            if status.phase == "waiting":
                queue.hold.set()
            await asyncio.sleep(0)
        await run
        return phases

    assert {"loading", "waiting", "computing", "publishing"} <= asyncio.run(scenario())


def test_a_loss_that_is_not_finite_names_step_and_groups_and_changes_nothing(tmp_path, table_dir):
    store = FileWeightStore(str(tmp_path / "weights"))
    queue = TableQueue(store)
    queue.poison = {9}
    learner, queue, reports = make(tmp_path, table_dir, store=store, queue=queue)
    with pytest.raises(
        TrainingError, match=r"the loss is nan at step 2: .*draw 9 attempt 0 \(prompt row:0\).* not made"
    ):
        asyncio.run(learner.run())
    assert len(reports) == 2 and queue.announced == [0, 1, 2]
    published = views(asyncio.run(store.fetch(2)))["table"]
    assert np.array_equal(learner.policy.model.table.detach().numpy(), published)


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


def test_stale_tokens_are_masked_when_the_batch_says_so(tmp_path, table_dir):
    learner, queue, reports = make(tmp_path, table_dir, steps=2, max_lag=1)
    queue.lag = 2
    queue_make = queue.make

    async def masked(step: int) -> Taken:
        return replace(await queue_make(step), masked=step == 1)

    queue.make = masked
    asyncio.run(learner.run())
    first, second = reports
    assert (first.tokens, first.masked_tokens) == (96, 0) and list(first.numbers.by_lag) == [2]
    assert (second.tokens, second.masked_tokens) == (0, 96) and second.numbers.by_lag == {}


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


def test_a_checkpoint_directory_opens_as_a_model(tmp_path, table_dir):
    learner, queue, _ = make(tmp_path, table_dir, steps=2)
    asyncio.run(learner.run())
    _, directory, _ = queue.commits[-1]
    again = TableForCausalLM.from_pretrained(directory)
    assert torch.equal(again.table, learner.policy.model.table)
