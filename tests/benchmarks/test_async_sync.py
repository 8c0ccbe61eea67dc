"""Lengths, fits and shares of benchmarks/async_sync.py."""

from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import async_sync, length_model, stage_fit, stage_times
from benchmarks.length_model import FLAT, KINDS, TAIL
from millrace.core.replay.config import QueueConfig
from millrace.core.types import GroupId


def sampled(lengths: length_model.Lengths, many: int) -> np.ndarray:
    """Lengths of responses by the policy's own table of transitions."""
    vocabulary = 99
    table = length_model.transitions(lengths.classes, vocabulary)
    logits = np.exp(table)
    chances = logits / logits.sum(axis=1, keepdims=True)
    random, found = np.random.default_rng(0), []
    for _ in range(many):
        token, length = 3, 0
        while token != length_model.EOS and length < lengths.limit:
            token = random.choice(vocabulary, p=chances[token])
            length += 1
        found.append(length)
    return np.array(found)


def test_the_tail_is_ten_medians_long() -> None:
    assert 9 <= TAIL.quantile(0.99) / TAIL.quantile(0.5) <= 11
    assert TAIL.limit / TAIL.quantile(0.5) == pytest.approx(20, rel=0.1)
    assert FLAT.mean == FLAT.mean_longest(64) == FLAT.limit


def test_the_policy_has_the_lengths_that_are_stated() -> None:
    found = sampled(TAIL, 1500)
    assert found.mean() == pytest.approx(TAIL.mean, rel=0.1)
    assert (found > TAIL.quantile(0.9)).mean() == pytest.approx(0.1, abs=0.025)
    assert (sampled(FLAT, 50) == FLAT.limit).all()


def test_a_line_gives_back_its_coefficients() -> None:
    rows = [(1, n, p) for n, p in [(1, 0), (8, 3), (64, 0), (64, 40), (20, 5)]]
    values = [0.002 + 0.0001 * n + 0.00003 * p for _, n, p in rows]
    assert stage_fit.line(rows, values) == pytest.approx([0.002, 0.0001, 0.00003])


def test_no_coefficient_of_a_line_is_negative_and_the_sum_is_kept() -> None:
    rows, values = [(1, n) for n in (10, 20, 30)], [3.0, 2.0, 1.0]
    found = stage_fit.scaled(rows, values)
    assert found[1] == 0
    assert (np.asarray(rows) @ found).sum() == pytest.approx(6.0)


def test_lengths_are_by_member_and_unknown_attempts_are_like_known_ones() -> None:
    rows = [
        {"draw": 3, "attempt": 0, "member": 1, "tokens": [1, 2]},
        {"draw": 3, "attempt": 0, "member": 0, "tokens": [1]},
        {"draw": 4, "attempt": 0, "member": 0, "tokens": [5] * 4},
        {"draw": 4, "attempt": 0, "member": 1, "tokens": [5] * 5},
    ]
    of = async_sync.recorded(stage_times.lengths_of(rows))
    assert of(GroupId(3, 0)) == (1, 2)
    assert of(GroupId(3, 1)) in {(1, 2), (4, 5)}
    assert of(GroupId(3, 1)) == of(GroupId(3, 1))


def test_what_was_never_trained_leaves_out_filters_and_masks() -> None:
    waste = {"generated": 100, "trained": 60, "masked": 10, "filtered:zero": 20, "stale:drop": 6, "failed:lost": 4}
    assert async_sync.never_trained(waste) == pytest.approx(0.1)


def test_every_arm_is_a_run_that_the_queue_takes() -> None:
    for arm in (async_sync.SYNC, async_sync.BOTH, *async_sync.RULES):
        config = QueueConfig(**async_sync.loop(arm))
        assert (config.max_lag == 0) == (arm not in async_sync.RULES)
    assert set(KINDS) == {"flat", "tail"}


def test_engine_steps_are_fitted_by_sequences_and_prefill() -> None:
    def step(many: int, prefilled: int) -> stage_fit.Step:
        return stage_fit.Step(many, prefilled, 0.002 + 0.0001 * many + 0.00003 * prefilled)

    steps = [step(many, prefilled) for many in (1, 2, 3, 8, 20, 64) for prefilled in (0, 90)]
    reports = [
        SimpleNamespace(tokens=t, masked_tokens=0, compute_s=0.1 + 1e-4 * t, publish_s=0.02) for t in (900, 2000)
    ]
    times, facts = stage_fit.fitted(steps, [0.003, 0.005, 0.004], reports, 0.001)  # type: ignore[arg-type]  # what is read of them
    assert [many for many, _ in times.decode_s] == [1, 2, 4, 8, 16, 32, 64]
    assert times.engine_s(64, 0) == pytest.approx(0.0084, rel=1e-3)
    assert times.engine_s(1, 100) == pytest.approx(0.0051, rel=1e-3)
    assert times.learner_s(1000) == pytest.approx(0.2)
    assert (times.load_s, times.publish_s) == (0.004, 0.02)
    assert facts["engine_off"] < 1e-3
