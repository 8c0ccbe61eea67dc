"""A few trained rollouts of each step, for people to read."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from millrace.core.types import Bools, Floats, Group, GroupId, GroupVerdict, Ints, Verdict, VerdictKind, VersionRun

# A rollout is read by its beginning and its end: what lies between is left out, and so never sent or stored.
HEAD_TOKENS, TAIL_TOKENS = 384, 128
HEAD_CHARACTERS, TAIL_CHARACTERS = 3000, 1000  # of the prompt


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SampledRollout:
    """One trained rollout. The arrays hold the T tokens that are shown, and copies: the batch can be forgotten."""

    step: int  # that trained it
    group: GroupId
    member: int  # its place in the group
    prompt_id: str
    prompt: str
    tokens_T: Ints
    sampled_T: Bools
    behaviour_logprob_T: Floats  # nats
    length: int  # tokens of the whole response
    cut: tuple[int, int] | None  # tokens [start, end) of the whole response that are not among the T
    versions: tuple[VersionRun, ...]  # over the whole response
    lag: tuple[int, ...]  # versions, of each run of `versions` when it was trained
    finish_reason: str
    reward: float  # as shaped
    advantage: float | None  # a mean, where each token has its own
    verdict: Verdict


def pick(
    groups: Sequence[Group],
    verdicts: Sequence[GroupVerdict],
    rewards: Sequence[Floats],
    lag: Sequence[Sequence[int]],
    *,
    step: int,
    limit: int,
    advantages: Sequence[Floats] | None = None,
) -> tuple[SampledRollout, ...]:
    """Of the rollouts of a step: one of the best, one of the worst, and others by chance, of many groups.

    Chance is a hash of the group and the member, so that a repeated step picks the same. With `limit` 1 it decides
    alone.

    Args:
        groups: of the batch.
        verdicts: theirs, in the same order.
        rewards: reward_G of the members that have a score, group by group.
        lag: per group, per version run in rollout order, versions.
        step: that trained them.
        limit: so many at most.
        advantages: per group, one for each reward or for each response token of these members.
    """
    members = [_scored(verdict) for verdict in verdicts]
    candidates = [
        _Candidate(float(reward), _chance(group.id, member), at, place, member)
        for at, group in enumerate(groups)
        for place, (member, reward) in enumerate(zip(members[at], rewards[at], strict=True))
    ]
    picked = []
    for each in _chosen(candidates, limit):
        of_group = None if advantages is None else advantages[each.group]
        advantage = None if of_group is None else _advantage(groups[each.group], members[each.group], of_group, each)
        picked.append(_sampled(groups[each.group], verdicts[each.group], lag[each.group], each, step, advantage))
    return tuple(picked)


@dataclass(frozen=True, slots=True)
class _Candidate:
    reward: float
    chance: int
    group: int  # place in the batch
    place: int  # among the members that have a score
    member: int  # place in the whole group


def _scored(verdict: GroupVerdict) -> list[int]:
    return [at for at, each in enumerate(verdict.verdicts) if each.kind is not VerdictKind.JUDGE_FAILED]


def _chance(group: GroupId, member: int) -> int:
    digest = blake2b(f"{group.draw}/{group.attempt}/{member}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _chosen(candidates: Sequence[_Candidate], limit: int) -> list[_Candidate]:
    by_chance = sorted(candidates, key=lambda each: each.chance)
    extremes = (max, min) if limit > 1 and by_chance else ()
    chosen = [extreme(by_chance, key=lambda each: each.reward) for extreme in extremes]
    met: set[int] = set()
    first: list[_Candidate] = []
    again: list[_Candidate] = []
    for each in [*chosen, *by_chance]:
        (again if each.group in met else first).append(each)
        met.add(each.group)
    return list(dict.fromkeys([*chosen, *first, *again]))[:limit]


def _advantage(group: Group, members: Sequence[int], advantage: Floats, each: _Candidate) -> float:
    if len(advantage) == len(members):
        return float(advantage[each.place])
    ends = np.cumsum([len(group.rollouts[member]) for member in members])
    own = np.split(advantage, ends[:-1])[each.place]
    return float(own.mean()) if len(own) else 0.0


def _sampled(
    group: Group, verdict: GroupVerdict, lag: Sequence[int], each: _Candidate, step: int, advantage: float | None
) -> SampledRollout:
    rollout = group.rollouts[each.member]
    before = sum(len(earlier.versions) for earlier in group.rollouts[: each.member])
    length = len(rollout)
    cut = (HEAD_TOKENS, length - TAIL_TOKENS) if length > HEAD_TOKENS + TAIL_TOKENS else None
    shown = np.r_[:HEAD_TOKENS, length - TAIL_TOKENS : length] if cut else np.arange(length)
    return SampledRollout(
        step=step,
        group=group.id,
        member=each.member,
        prompt_id=group.prompt.id,
        prompt=_shortened(group.prompt.text),
        tokens_T=rollout.tokens_T[shown],
        sampled_T=rollout.sampled_T[shown],
        behaviour_logprob_T=rollout.behaviour_logprob_T[shown],
        length=length,
        cut=cut,
        versions=rollout.versions,
        lag=tuple(int(of_run) for of_run in lag[before : before + len(rollout.versions)]),
        finish_reason=rollout.finish_reason,
        reward=each.reward,
        advantage=advantage,
        verdict=verdict.verdicts[each.member],
    )


def _shortened(text: str) -> str:
    left_out = len(text) - HEAD_CHARACTERS - TAIL_CHARACTERS
    if left_out <= 0:
        return text
    return f"{text[:HEAD_CHARACTERS]} [... {left_out} characters ...] {text[-TAIL_CHARACTERS:]}"
