"""The learner's loop on a table, against an in-process queue."""

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from millrace.core.protocols import Manifest, Resumption, Taken
from millrace.core.weight_store import FileWeightStore
from millrace.core.weights import views
from millrace.learner.table_model import TableForCausalLM
from tests.learner.table_loop import CONFIG, LENGTH, VOCABULARY, TableQueue, make


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


def test_a_checkpoint_directory_opens_as_a_model(tmp_path, table_dir):
    learner, queue, _ = make(tmp_path, table_dir, steps=2)
    asyncio.run(learner.run())
    _, directory, _ = queue.commits[-1]
    again = TableForCausalLM.from_pretrained(directory)
    assert torch.equal(again.table, learner.policy.model.table)
