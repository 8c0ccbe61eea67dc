"""Judged groups of a step -> packed micro-batches, with advantages and the weight of every token in the loss.

    rewards -> selection, advantages per group -> normaliser over the whole batch -> for each optimiser step its
    groups, token weights over all of them -> micro-batches of at most `token_budget` rows, groups together

N counts the tokens of the loss: sampled, selected, and not masked for their age. Other tokens stay context.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from millrace.core.recipe import Updates
from millrace.core.types import Bools, Floats, Ints
from millrace.learner.attention import Plan, Spans
from millrace.learner.judged import Judged
from millrace.learner.sequences import Sequences


class Weights(Protocol):
    """What decides how much each loss token weighs."""

    def token_weights(self, sequences: Sequences, *, group_S: Any) -> Floats: ...


class Advantages(Weights, Protocol):
    """What the assembly asks of an objective."""

    @property
    def zero_advantage_is_zero_loss(self) -> bool: ...

    @property
    def keeps_groups_whole(self) -> bool: ...

    def keep(self, have: Mapping[str, Any]) -> Bools: ...

    def advantages(self, have: Mapping[str, Any], *, again: bool = False) -> Floats: ...

    def normalised(self, advantage_N: Floats, sequences: Sequences, *, group_S: Any) -> Floats: ...


@dataclass(slots=True, kw_only=True, eq=False)
class Sample:
    """One response on its way into a batch."""

    group: int  # place in the batch; consecutive samples of one group share its prompt
    prompt_P: Ints
    token_T: Ints
    behaviour_logprob_T: Floats | None  # None: given, not sampled
    lag_T: Ints
    place_N: NDArray[np.int64]  # of its loss tokens among the T; at least one
    reward: float = 0.0
    advantage_N: Floats | None = None  # of its loss tokens; None: 0
    scored: Mapping[str, Floats] = field(default_factory=dict)  # words known before the step, of its loss tokens
    weight_N: Floats | None = None  # of its loss tokens, once the batch is known

    @property
    def rows(self) -> int:
        """Rows it takes in a packed batch: its last loss token, and what follows, is never read."""
        return int(self.place_N[-1])

    @property
    def length(self) -> int:
        """Loss tokens."""
        return len(self.place_N)


@dataclass(frozen=True, slots=True, kw_only=True)
class Microbatch:
    """One packed row of C positions, and its N loss tokens."""

    token_C: NDArray[np.int64]
    position_C: NDArray[np.int64]
    plan: Plan  # how the row attends
    row_N: NDArray[np.int64]  # the row whose hidden state predicts the token
    token_N: NDArray[np.int64]
    sequences: Sequences  # of the N
    behaviour_logprob_N: Floats | None  # None: given answers
    advantage_N: Floats
    weight_N: Floats
    staleness_N: Ints
    scored: Mapping[str, Floats]  # words known before the step
    reward_S: Floats
    group_S: NDArray[np.int64]  # places in the batch
    step: int = 0  # optimiser steps made before this batch

    @property
    def groups(self) -> tuple[int, ...]:
        """Places in the batch."""
        return tuple(dict.fromkeys(self.group_S.tolist()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembled:
    """The batch of one step."""

    updates: tuple[tuple[Microbatch, ...], ...]  # the micro-batches of each optimiser step on it
    tokens: int  # in the loss, those of skipped groups among them
    tokens_of: tuple[int, ...]  # the same, group by group
    masked_tokens: int  # sampled, left out for their age, by the selection, or for want of a verdict
    invalid: int  # rollouts without a verdict
    skipped_groups: int  # of zero advantage, where that is exactly zero loss
    rows: int  # of all micro-batches of one pass
    unpacked_rows: int  # the same if every response carried its own prompt
    padding_share: float  # of the rows that attention works on; all else works on unpadded rows
    reward: float  # mean over valid rollouts
    reward_std: float
    length: float  # mean response length of valid rollouts, tokens
    scores: Mapping[str, float]  # prompt id -> mean score
    advantages: tuple[Floats, ...]  # of each group's members, for all their response tokens, as the estimator made them

    def reused_tokens(self, uses: Sequence[int]) -> int:
        """Loss tokens of the groups that some batch has trained before; without `uses` there are none."""
        return sum(
            tokens for tokens, use in zip(self.tokens_of, uses or (0,) * len(self.tokens_of), strict=True) if use
        )


def assemble(
    groups: Sequence[Judged],
    objective: Advantages,
    *,
    token_budget: int,
    mask_above: int | None = None,
    updates: Updates | None = None,
    step: int = 0,
    seed: int = 0,
) -> Assembled:
    """Pack the groups of one step.

    Args:
        groups: judged, shaped, and none of them filtered.
        objective: makes selections and advantages of rewards, and token weights of sequences.
        token_budget: rows of a micro-batch; only a single response that is longer exceeds it, or a group that an
            objective wants whole.
        mask_above: tokens of a greater lag leave the loss; None: none does.
        updates: how many optimiser steps, on which parts of the batch.
        step: optimiser steps made before it.
        seed: of the order in which several optimiser steps see the groups.
    """
    updates = updates or Updates()
    words = [group.words(step=step) for group in groups]
    # Once each: an estimator may have memory.
    advantages = [objective.advantages(have, again=group.use > 0) for group, have in zip(groups, words, strict=True)]
    samples = [
        sample
        for at, (group, have) in enumerate(zip(groups, words, strict=True))
        for sample in _samples(at, group, objective.keep(have), advantages[at], mask_above)
    ]
    _normalise(samples, objective)
    parts = list(_parts(samples, len(groups), updates, (seed, step)))
    packed = [_packed(part, objective, token_budget, step) for part in parts]
    one_pass = [micro for part in packed[: updates.minibatches] for micro in part]
    live = {group for micro in one_pass for group in micro.groups}
    padded = sum(micro.plan.padded_cells for micro in one_pass)
    tokens = sum(sample.length for sample in samples)
    sampled = sum(int(rollout.sampled_T.sum()) for group in groups for rollout in group.group.rollouts)
    reward = np.concatenate([*(group.reward_G for group in groups), np.empty(0, np.float32)])
    lengths = [len(rollout) for group in groups for rollout in group.members.rollouts]
    useful = [sample for sample in samples if sample.group in live]
    return Assembled(
        updates=tuple(packed),
        tokens=tokens,
        tokens_of=_tokens_of(samples, len(groups)),
        masked_tokens=sampled - tokens,
        invalid=sum(len(group.group.rollouts) for group in groups) - len(lengths),
        skipped_groups=len({sample.group for sample in samples} - live),
        rows=sum(len(micro.token_C) for micro in one_pass),
        unpacked_rows=sum(sample.rows + len(sample.prompt_P) for sample in useful),
        padding_share=1 - sum(m.plan.cells for m in one_pass) / padded if padded else 0.0,
        reward=float(reward.mean()) if len(reward) else 0.0,
        reward_std=float(reward.std()) if len(reward) else 0.0,
        length=float(np.mean(lengths)) if lengths else 0.0,
        scores=_mean_by_prompt(groups),
        advantages=tuple(advantages),
    )


def _samples(index: int, group: Judged, keep_G: Bools, advantage_N: Floats, mask_above: int | None) -> Iterator[Sample]:
    """The selected members of a group that have tokens in the loss."""
    ends = np.cumsum(group.sequences.lengths_S).tolist()
    for member, (rollout, place) in enumerate(zip(group.members.rollouts, group.places, strict=True)):
        lag_T = group.lags[place]
        loss_T = rollout.sampled_T if mask_above is None else rollout.sampled_T & (lag_T <= mask_above)
        place_N = np.flatnonzero(loss_T)
        if not keep_G[member] or not len(place_N):
            continue
        own_N = place_N + ends[member] - len(rollout)
        yield Sample(
            group=index,
            prompt_P=group.members.prompt.tokens_P,
            token_T=rollout.tokens_T,
            behaviour_logprob_T=rollout.behaviour_logprob_T,
            lag_T=lag_T,
            place_N=place_N,
            reward=float(group.reward_G[member]),
            advantage_N=advantage_N[own_N],
            scored={word: value_N[own_N] for word, value_N in group.scored.items()},
        )


def _normalise(samples: Sequence[Sample], objective: Advantages) -> None:
    """Put the advantages of the batch on the recipe's scale."""
    if not samples:
        return
    sequences, group_S = _sequences(samples)
    advantage_N = objective.normalised(np.concatenate([_advantage(s) for s in samples]), sequences, group_S=group_S)
    for sample, own in zip(samples, np.split(advantage_N, np.cumsum(sequences.lengths_S)[:-1]), strict=True):
        sample.advantage_N = own


def _parts(samples: Sequence[Sample], groups: int, updates: Updates, seed: tuple[int, int]) -> Iterator[list[Sample]]:
    """The samples of each optimiser step: in every pass each group once, in an order of that pass."""
    if updates.per_batch == 1:
        yield list(samples)
        return
    for epoch in range(updates.epochs):
        order = np.random.default_rng((*seed, epoch)).permutation(groups)
        for part in np.array_split(order, updates.minibatches):
            members = set(part.tolist())
            yield [replace(sample) for sample in samples if sample.group in members]


def _packed(samples: Sequence[Sample], objective: Advantages, token_budget: int, step: int) -> tuple[Microbatch, ...]:
    """The micro-batches of one optimiser step."""
    weigh(samples, objective)
    parts = split(_useful(samples, objective), token_budget, whole_groups=objective.keeps_groups_whole)
    return tuple(replace(pack(part), step=step) for part in parts)


def _tokens_of(samples: Sequence[Sample], groups: int) -> tuple[int, ...]:
    """Loss tokens, group by group."""
    tokens = [0] * groups
    for sample in samples:
        tokens[sample.group] += sample.length
    return tuple(tokens)


def _mean_by_prompt(groups: Sequence[Judged]) -> dict[str, float]:
    by_prompt: dict[str, list[float]] = {}
    for group in groups:
        valid = [verdict.score for verdict in group.verdicts if verdict.score is not None]
        by_prompt.setdefault(group.group.prompt.id, []).extend(valid)
    return {prompt: float(np.mean(valid)) for prompt, valid in by_prompt.items() if valid}


def weigh(samples: Sequence[Sample], objective: Weights) -> None:
    """Give every loss token its weight. Denominators run over all of them, whatever is skipped later."""
    if not samples:
        return
    sequences, group_S = _sequences(samples)
    weight_N = objective.token_weights(sequences, group_S=group_S)
    for sample, weights in zip(samples, np.split(weight_N, np.cumsum(sequences.lengths_S)[:-1]), strict=True):
        sample.weight_N = weights


def _sequences(samples: Sequence[Sample]) -> tuple[Sequences, NDArray[np.int64]]:
    lengths_S = np.array([sample.length for sample in samples], np.int64)
    return Sequences(lengths_S), np.array([sample.group for sample in samples], np.int64)


def _advantage(sample: Sample) -> Floats:
    return np.zeros(sample.length, np.float32) if sample.advantage_N is None else sample.advantage_N


def _useful(samples: Sequence[Sample], objective: Advantages) -> list[Sample]:
    """Without groups whose every advantage is zero, where the objective says that their loss is zero then."""
    if not objective.zero_advantage_is_zero_loss:
        return list(samples)
    live = {sample.group for sample in samples if _advantage(sample).any()}
    return [sample for sample in samples if sample.group in live]


def split(samples: Sequence[Sample], token_budget: int, *, whole_groups: bool = False) -> list[list[Sample]]:
    """Micro-batches: first fit, largest first. A group stays whole unless it exceeds the budget alone.

    A single response longer than the budget is a micro-batch of its own; with `whole_groups` such a group is.
    """
    pieces: list[tuple[int, list[Sample]]] = []  # rows, samples of one group
    for sample in samples:
        rows = pieces[-1][0] + sample.rows if pieces and pieces[-1][1][0].group == sample.group else None
        if rows is None or (rows > token_budget and not whole_groups):
            pieces.append((len(sample.prompt_P) + sample.rows, [sample]))
        else:
            pieces[-1][1].append(sample)
            pieces[-1] = (rows, pieces[-1][1])
    pieces.sort(key=lambda piece: -piece[0])
    parts: list[list[Sample]] = []
    room: list[int] = []
    for rows, piece in pieces:
        at = next((at for at, free in enumerate(room) if rows <= free), None)
        if at is None:
            parts.append(piece)
            room.append(token_budget - rows)
        else:
            parts[at] = parts[at] + piece
            room[at] -= rows
    return parts


def pack(samples: Sequence[Sample]) -> Microbatch:
    """One packed row; consecutive samples of a group share its prompt."""
    tokens: list[Ints] = []
    positions: list[tuple[int, int]] = []  # first position and number of rows of each run
    prompts: list[tuple[int, int]] = []
    responses: list[tuple[int, int, int]] = []
    rows_N: list[NDArray[np.int64]] = []
    row = 0
    for at, sample in enumerate(samples):
        length, rows = len(sample.prompt_P), sample.rows
        if at == 0 or samples[at - 1].group != sample.group:
            prompts.append((row, length))
            tokens.append(sample.prompt_P)
            positions.append((0, length))
            row += length
        responses.append((len(prompts) - 1, row, rows))
        tokens.append(sample.token_T[:rows])
        positions.append((length, rows))
        # The first token of a response is predicted by the last row of its prompt, the others by the row before.
        rows_N.append(np.where(sample.place_N == 0, prompts[-1][0] + length - 1, row + sample.place_N - 1))
        row += rows
    prompt_KX, response_SX, run_RX = (np.array(x, np.int64) for x in (prompts, responses, positions))
    spans = Spans(
        prompt_start_K=prompt_KX[:, 0],
        prompt_length_K=prompt_KX[:, 1],
        prompt_S=response_SX[:, 0],
        start_S=response_SX[:, 1],
        length_S=response_SX[:, 2],
    )
    first_R, length_R = run_RX[:, 0], run_RX[:, 1]
    sequences, group_S = _sequences(samples)
    return Microbatch(
        token_C=np.concatenate(tokens).astype(np.int64),
        position_C=np.arange(row) - np.repeat(np.cumsum(length_R) - length_R - first_R, length_R),
        plan=Plan.of(spans),
        row_N=np.concatenate(rows_N),
        token_N=np.concatenate([s.token_T[s.place_N] for s in samples]).astype(np.int64),
        sequences=sequences,
        behaviour_logprob_N=_behaviour(samples),
        advantage_N=np.concatenate([_advantage(s) for s in samples]),
        weight_N=np.concatenate([_weights(s) for s in samples]),
        staleness_N=np.concatenate([s.lag_T[s.place_N] for s in samples]),
        scored={word: np.concatenate([s.scored[word] for s in samples]) for word in samples[0].scored},
        reward_S=np.array([s.reward for s in samples], np.float32),
        group_S=group_S,
    )


def _behaviour(samples: Sequence[Sample]) -> Floats | None:
    parts = [s.behaviour_logprob_T[s.place_N] for s in samples if s.behaviour_logprob_T is not None]
    return np.concatenate(parts).astype(np.float32) if len(parts) == len(samples) else None


def _weights(sample: Sample) -> Floats:
    """Zeros where nobody weighs: for a pass that makes no loss."""
    return np.zeros(sample.length, np.float32) if sample.weight_N is None else sample.weight_N.astype(np.float32)
