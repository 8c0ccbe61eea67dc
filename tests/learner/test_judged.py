"""The words of a judged group: only valid members, in their order, and texts only for who asks."""

import numpy as np
from msgspec.structs import replace

from millrace.core import words
from millrace.core.types import GroupVerdict, Verdict, VerdictKind, VersionRun
from millrace.learner.judged import Judged, Unshaped, shape_all


def test_words_of_a_group_are_those_of_its_valid_members(group_of):
    rng = np.random.default_rng(0)
    runs = [(VersionRun(1, 0, 2),), (VersionRun(1, 0, 3),), (VersionRun(1, 0, 1), VersionRun(3, 1, 2))]
    group = group_of(7, 2, (2, 3, 2), rng, runs=runs)
    group = replace(group, rollouts=(*group.rollouts[:2], replace(group.rollouts[2], finish_reason="length")))
    verdict = GroupVerdict(
        id=group.id,
        verdicts=(
            Verdict(kind=VerdictKind.SCORED, score=0.5, components={"format": 1.0}),
            Verdict(kind=VerdictKind.JUDGE_FAILED, score=None),
            Verdict(kind=VerdictKind.SUBJECT_FAILED, score=0.0),
        ),
    )
    judged = Judged.of(group, verdict, [4, 9, 4, 2])
    have = judged.words(step=11)
    assert have["reward_G"].tolist() == [0.5, 0.0] and have["length_G"].tolist() == [2, 2]
    assert have["truncated_G"].tolist() == [False, True] and have["step"] == 11
    assert have["staleness_N"].tolist() == [4, 4, 4, 2]
    behaviour = [group.rollouts[at].behaviour_logprob_T for at in (0, 2)]
    np.testing.assert_array_equal(have["behaviour_logprob_N"], np.concatenate(behaviour))
    assert have["sequences"].lengths_S.tolist() == [2, 2]
    asked: list[int] = []

    def decode(responses):
        asked.extend(map(len, responses))
        return ["a", "b"]

    more = judged.judged_words(frozenset({"text_G"}), max_tokens=9, decode=decode)
    assert more["failed_G"].tolist() == [False, True] and more["text_G"] == ["a", "b"] and asked == [2, 2]
    np.testing.assert_array_equal(more["components_G"]["format"], np.array([1.0, np.nan], np.float32))
    assert "text_G" not in judged.judged_words(frozenset(), max_tokens=9, decode=decode)
    assert have.keys() | more.keys() | words.SCORED == words.SLOTS["shaper"]


def test_a_group_that_nobody_could_judge_has_empty_words(group_of, judged):
    group = group_of(0, 2, (2, 3), np.random.default_rng(0))
    have = Judged.of(group, judged(group, (None, None)), [0, 0]).words(step=0)
    assert all(len(have[word]) == 0 for word in ("reward_G", "length_G", "truncated_G", "staleness_N"))


class Average(Unshaped):
    """Rewards less the mean of those before; filters every group, and remembers whom it was asked of."""

    def __init__(self) -> None:
        self.seen: list[float] = []
        self.asked = 0

    def shape(self, have):
        before = float(np.mean(self.seen)) if self.seen else 0.0
        self.seen.extend(have["reward_G"].tolist())
        return have["reward_G"] - before

    def keep(self, have):
        self.asked += 1
        return "never"

    def memory(self):
        return {"seen": list(self.seen), "asked": self.asked}

    def restore(self, saved):
        self.seen, self.asked = list(saved["seen"]), saved["asked"]


def test_methods_with_memory_see_a_group_once_however_often_it_is_used(group_of, judged):
    rng = np.random.default_rng(0)
    rewards = {0: (1.0, 1.0), 1: (9.0, 9.0), 2: (3.0, 3.0)}
    groups = []
    for draw, scores in rewards.items():
        group = group_of(draw, 2, (2, 3), rng)
        groups.append(Judged.of(group, judged(group, scores), [0, 0], use=2 if draw == 1 else 0))
    shaping = Average()
    shaping.seen = [1.0]
    found = shape_all(groups, shaping, step=0, max_tokens=9, decode=lambda responses: [])
    shaped = {each.group.id.draw: each for each in found}
    assert {draw: each.reward_G.tolist() for draw, each in shaped.items()} == {0: [0, 0], 1: [8, 8], 2: [2, 2]}
    assert shaping.seen == [1.0, 1.0, 1.0, 3.0, 3.0]
    assert {draw: each.rule for draw, each in shaped.items()} == {0: "never", 1: "", 2: "never"} and shaping.asked == 2
