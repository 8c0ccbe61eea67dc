"""The simulated loop against what can be computed by hand."""

import numpy as np
import pytest

from benchmarks.replay_loop import StageTimes, simulate
from millrace.core.replay.config import QueueConfig
from millrace.core.types import GroupId

B, N, T = 4, 2, 10  # groups per step, rollouts of a group, tokens of a response
SLOTS = B * N
SKIPPED = 6


def queue(max_lag: int, *, stale: str = "wait", steps: int = 30, groups: int = B, size: int = N) -> QueueConfig:
    requeues = 1 if stale == "requeue" else 0
    sizes = {"groups_per_step": groups, "group_size": size, "steps": steps}
    return QueueConfig.parse({**sizes, "max_lag": max_lag, "stale": stale, "requeues": requeues}, source="test")


def flat(group: GroupId) -> tuple[int, ...]:
    return (T,) * N


def geometric(group: GroupId) -> list[int]:
    """Mean 20, the same whenever it is asked for."""
    random = np.random.default_rng([7, group.draw, group.attempt])
    return [int(length) for length in random.geometric(1 / 20, N)]


def steps_of(step_s: float, sequence_s: float = 0.0) -> tuple[tuple[int, float], ...]:
    """Of an engine whose steps take so long, and so much longer for each sequence."""
    return ((0, step_s), (100, step_s + 100 * sequence_s))


BALANCED = StageTimes(decode_s=steps_of(1 / T), learner_step_s=1.0)  # Tg = Tt = 1 s a batch


def test_flat_lengths_at_balance_gain_a_factor_of_two() -> None:
    sync = simulate(queue(0), BALANCED, flat, slots=SLOTS)
    pipelined = simulate(queue(2), BALANCED, flat, slots=SLOTS)
    assert sync.steps_per_s(SKIPPED) == pytest.approx(0.5)
    assert sync.idle(SKIPPED) == pytest.approx(0.5)
    assert pipelined.steps_per_s(SKIPPED) == pytest.approx(1.0)
    assert pipelined.idle(SKIPPED) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("train_s", [0.25, 0.5, 3.0])
def test_the_slower_stage_sets_the_pace(train_s: float) -> None:
    times = StageTimes(decode_s=steps_of(1 / T), learner_step_s=train_s)
    sync = simulate(queue(0), times, flat, slots=SLOTS)
    pipelined = simulate(queue(4), times, flat, slots=SLOTS)
    assert sync.steps_per_s(SKIPPED) == pytest.approx(1 / (1 + train_s))
    assert pipelined.steps_per_s(SKIPPED) == pytest.approx(1 / max(1, train_s))


def test_every_stage_of_a_synchronous_step_counts_once() -> None:
    times = StageTimes(
        decode_s=steps_of(0.01, 0.001),
        prefill_s=0.002,
        judge_s=0.05,
        learner_step_s=0.1,
        token_s=0.003,
        publish_s=0.2,
        load_s=0.07,
    )
    found = simulate(queue(0), times, flat, slots=SLOTS, prompt_tokens=5)
    engine_s = T * (0.01 + 0.001 * SLOTS) + SLOTS * (5 - 1) * 0.002
    step_s = engine_s + B * 0.05 + 0.1 + B * N * T * 0.003 + 0.2 + 0.07
    assert 1 / found.steps_per_s(SKIPPED) == pytest.approx(step_s)


def test_a_tail_gains_longest_over_mean() -> None:
    """A free learner: a synchronous step lasts as long as its longest response, an asynchronous one as the mean."""
    times = StageTimes(decode_s=steps_of(1.0))
    sync = simulate(queue(0, steps=60), times, geometric, slots=SLOTS)
    free = simulate(queue(40, stale="train", steps=60), times, geometric, slots=SLOTS)
    longest = [max(max(geometric(GroupId(k * B + i, 0))) for i in range(B)) for k in range(60)]
    mean = np.mean([geometric(GroupId(draw, 0)) for draw in range(60 * B)])
    assert 1 / sync.steps_per_s(SKIPPED) == pytest.approx(np.mean(longest[SKIPPED:]))
    gain = free.steps_per_s(SKIPPED) / sync.steps_per_s(SKIPPED)
    assert gain == pytest.approx(np.mean(longest) / mean, rel=0.15)


def test_the_knee_of_little() -> None:
    """At most (max_lag + 1) B groups are alive: more slots than that hold nothing.

    Newer weights wait for the engine's step under way, so that a group is alive for T + 1 of them.
    """
    times = StageTimes(decode_s=steps_of(1 / T))  # latency 1 s, whatever runs
    speed = [
        simulate(queue(max_lag, steps=60), times, flat, slots=4 * SLOTS, prefetch=0).steps_per_s(12)
        for max_lag in (0, 1, 2, 3, 4, 6)
    ]
    assert speed[0] == pytest.approx(1.0)
    assert speed[1:4] == pytest.approx([many * T / (T + 1) for many in (2, 3, 4)], rel=0.03)
    assert speed[4:] == pytest.approx([4.0, 4.0], rel=0.05)  # the slots are full


@pytest.mark.parametrize("stale", ["wait", "mask", "train", "drop", "requeue"])
def test_the_bound_and_the_books_hold(stale: str) -> None:
    times = StageTimes(decode_s=steps_of(1.0), learner_step_s=15.0)
    found = simulate(queue(2, stale=stale, steps=80), times, geometric, slots=SLOTS)
    books = found.tokens
    assert books["unaccounted"] == 0
    beyond = sum(many for lag, many in found.lags.items() if lag > 2)
    stale_tokens = sum(many for row, many in books.items() if row.startswith("stale:"))
    assert (beyond > 0) == (stale in ("mask", "train"))  # what is masked is in batches, but not in the loss
    assert (books["masked"] > 0) == (stale == "mask")
    assert (stale_tokens > 0) == (stale in ("drop", "requeue"))


def test_no_draw_is_generated_that_no_step_can_use() -> None:
    for stale in ("wait", "mask", "train"):
        found = simulate(queue(4, stale=stale), BALANCED, geometric, slots=SLOTS)
        drawn = [GroupId(draw, 0) for draw in range(30 * B)]
        assert found.tokens["generated"] == sum(sum(geometric(group)) for group in drawn)
        assert found.tokens["trained"] + found.tokens["masked"] == found.tokens["generated"]


def test_a_swap_reads_running_contexts_again() -> None:
    """Reading them again costs the synchronous engine nothing: nothing runs while weights change."""
    free, dear = (
        StageTimes(decode_s=steps_of(0.1), prefill_s=prefill_s, learner_step_s=0.3) for prefill_s in (0, 0.01)
    )
    assert simulate(queue(0), dear, flat, slots=SLOTS).steps_per_s(SKIPPED) == pytest.approx(
        simulate(queue(0), free, flat, slots=SLOTS).steps_per_s(SKIPPED)
    )
    engine_s = [simulate(queue(4), times, geometric, slots=SLOTS).engine_busy_s for times in (free, dear)]
    assert engine_s[1] > 1.05 * engine_s[0]
