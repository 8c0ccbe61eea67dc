"""Which rollouts of a step are kept for people to read, and what is kept of them."""

from itertools import pairwise

import numpy as np
import pytest
from msgspec.structs import replace

from millrace.core.types import Group, GroupId, GroupVerdict, Prompt, Rollout, Verdict, VerdictKind, VersionRun
from millrace.learner import samples
from millrace.learner.samples import SampledRollout, pick

FAILED = Verdict(kind=VerdictKind.JUDGE_FAILED, score=None)


def rollout_of(length: int, *, mark: int = 0, cuts: tuple[int, ...] = ()) -> Rollout:
    """Tokens count from `mark`; the version changes at each of `cuts`."""
    edges = [0, *cuts, length]
    return Rollout(
        tokens_T=np.arange(mark, mark + length, dtype=np.int32),
        sampled_T=np.ones(length, bool),
        behaviour_logprob_T=-np.arange(length, dtype=np.float32),
        versions=tuple(VersionRun(i, *run) for i, run in enumerate(pairwise(edges))),
        finish_reason="stop",
        seed=0,
    )


def group_of(draw: int, *rollouts: Rollout, text: str = "1+1=") -> Group:
    prompt = Prompt(id=f"train:{draw}", text=text, tokens_P=np.arange(3, dtype=np.int32))
    return Group(id=GroupId(draw, 0), prompt=prompt, rollouts=rollouts, lease_epoch=1)


def batch(*scores: tuple[float | None, ...]):
    """A group for each tuple of scores; None where the judge failed. Rollouts say who they are by their tokens."""
    groups = [
        group_of(draw, *(rollout_of(2, mark=100 * draw + 10 * at) for at in range(len(of_group))))
        for draw, of_group in enumerate(scores)
    ]
    verdicts = [
        GroupVerdict(
            id=group.id,
            verdicts=tuple(FAILED if s is None else Verdict(kind=VerdictKind.SCORED, score=s) for s in of_group),
        )
        for group, of_group in zip(groups, scores, strict=True)
    ]
    rewards = [np.array([s for s in of_group if s is not None], np.float32) for of_group in scores]
    return groups, verdicts, rewards, [[0] * len(group.rollouts) for group in groups]


def who(picked: tuple[SampledRollout, ...]) -> list[tuple[int, int]]:
    return [(each.group.draw, each.member) for each in picked]


def test_the_best_and_the_worst_come_first_and_then_other_groups() -> None:
    parts = batch((0.0, 0.5), (0.25, 0.75), (0.5, 1.0), (0.5, -2.0), (0.5, 0.5))
    picked = pick(*parts, step=3, limit=5)
    assert who(picked)[:2] == [(2, 1), (3, 1)]
    assert len({each.group for each in picked}) == 5, "each group is met before one is met again"
    assert {each.step for each in picked} == {3}
    assert [each.reward for each in picked][:2] == [1.0, -2.0]
    assert len(pick(*parts, step=3, limit=100)) == 10 == len(set(who(pick(*parts, step=3, limit=100))))


def test_a_repeated_step_picks_the_same_whatever_the_order_of_the_batch() -> None:
    groups, verdicts, rewards, lag = batch(*[(1.0, 0.0)] * 40)
    picked = pick(groups, verdicts, rewards, lag, step=1, limit=6)
    backwards = pick(groups[::-1], verdicts[::-1], rewards[::-1], lag[::-1], step=1, limit=6)
    assert who(picked) == who(backwards)
    assert len({each.group for each in picked}) == 6


def test_chance_is_not_the_order_of_the_batch() -> None:
    """All rewards are equal, so that the best, the worst and the others are chance alone."""
    alone = [who(pick(*batch(*[(1.0,)] * many), step=1, limit=1))[0][0] for many in range(1, 60)]
    assert len(set(alone)) > 2 and alone != sorted(alone, reverse=True)
    assert alone[-1] not in (0, 58)


@pytest.mark.parametrize("limit", [0, 1, 2, 3])
def test_no_more_than_asked_for(limit: int) -> None:
    assert len(pick(*batch((1.0, 0.0), (0.5,)), step=1, limit=limit)) == limit


def test_a_batch_without_a_score_has_no_samples() -> None:
    assert pick(*batch((None, None)), step=1, limit=4) == ()
    assert pick([], [], [], [], step=1, limit=4) == ()


def test_members_without_a_score_are_passed_over_and_the_places_stay_right() -> None:
    groups, verdicts, rewards, _ = batch((None, 1.0, None, 0.0))
    rollouts = (rollout_of(1), rollout_of(4, mark=10, cuts=(1, 3)), rollout_of(1), rollout_of(2, mark=30, cuts=(1,)))
    groups = [replace(groups[0], rollouts=rollouts)]
    best, worst = pick(groups, verdicts, rewards, [[9, 3, 2, 1, 8, 5, 4]], step=1, limit=2)
    assert (best.member, best.reward, best.verdict.score) == (1, 1.0, 1.0)
    assert best.tokens_T.tolist() == [10, 11, 12, 13]
    assert best.versions == (VersionRun(0, 0, 1), VersionRun(1, 1, 3), VersionRun(2, 3, 4))
    assert best.lag == (3, 2, 1)
    assert (worst.member, worst.tokens_T.tolist(), worst.lag) == (3, [30, 31], (5, 4))


def test_an_advantage_may_be_of_rollouts_or_of_tokens() -> None:
    groups, verdicts, rewards, lag = batch((None, 1.0, 0.0))
    of_rollouts = pick(groups, verdicts, rewards, lag, step=1, limit=2, advantages=[np.array([2.0, -2.0])])
    assert [each.advantage for each in of_rollouts] == [2.0, -2.0]
    of_tokens = pick(groups, verdicts, rewards, lag, step=1, limit=2, advantages=[np.array([1.0, 2.0, -3.0, -5.0])])
    assert [each.advantage for each in of_tokens] == [1.5, -4.0]
    assert pick(groups, verdicts, rewards, lag, step=1, limit=1)[0].advantage is None


def test_a_long_response_and_a_long_prompt_are_cut_in_the_middle() -> None:
    head, tail = samples.HEAD_TOKENS, samples.TAIL_TOKENS
    _, verdicts, rewards, lag = batch((1.0,))
    long = group_of(0, rollout_of(head + tail + 5), text="x" * 9000)
    (each,) = pick([long], verdicts, rewards, lag, step=1, limit=4)
    assert (each.length, each.cut) == (head + tail + 5, (head, head + 5))
    assert each.tokens_T.tolist() == [*range(head), *range(head + 5, head + 5 + tail)]
    assert each.behaviour_logprob_T.tolist() == [-float(token) for token in each.tokens_T]
    assert len(each.sampled_T) == len(each.tokens_T)
    assert len(each.prompt) < 4100 and "[... 5000 characters ...]" in each.prompt
    whole = group_of(0, rollout_of(head + tail))
    (each,) = pick([whole], verdicts, rewards, lag, step=1, limit=4)
    assert (each.cut, len(each.tokens_T)) == (None, head + tail)


def test_samples_hold_no_memory_of_the_batch() -> None:
    """Arrays of a decoded batch are views of it; the learner keeps its reports for long."""
    whole = np.arange(1000, dtype=np.int32)
    groups, verdicts, rewards, lag = batch((1.0,))
    view = replace(groups[0].rollouts[0], tokens_T=whole[:2])
    (each,) = pick([replace(groups[0], rollouts=(view,))], verdicts, rewards, lag, step=1, limit=1)
    assert not np.shares_memory(each.tokens_T, whole) and each.tokens_T.base is None
