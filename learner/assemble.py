"""Groups of a step -> packed micro-batches, with advantages and the weight of every token in the loss.

    groups with verdicts -> rewards (shape) -> advantages (objective) -> token weights over the WHOLE batch
    -> micro-batches of at most `token_budget` rows, whole groups together

N counts the tokens of the loss: sampled, and not masked for their age. Other tokens stay context.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from millrace.core.errors import TrainingError
from millrace.core.types import Floats, Group, GroupVerdict, Ints, Rollout, Verdict, VerdictKind
from millrace.learner.attention import Plan, Spans
from millrace.learner.sequences import Sequences

Shape = Callable[[Group, Sequence[Verdict]], Floats]


class Weights(Protocol):
    """What decides how much each loss token weighs."""

    def token_weights(self, sequences: Sequences, *, group_S: Any) -> Floats: ...


class Advantages(Weights, Protocol):
    """What the assembly asks of an objective."""

    @property
    def zero_advantage_is_zero_loss(self) -> bool: ...

    def advantages(self, have: Mapping[str, Any]) -> Floats: ...


def scores(group: Group, verdicts: Sequence[Verdict]) -> Floats:
    """Reward = the verifier's score. What `shape` is when a recipe shapes nothing.

    Args:
        group: of valid members only.
        verdicts: theirs.
    Returns:
        reward_G.
    """
    return np.array([verdict.score for verdict in verdicts], np.float32)


@dataclass(slots=True, kw_only=True, eq=False)
class Sample:
    """One response on its way into a batch."""

    group: int  # place in the batch; consecutive samples of one group share its prompt
    prompt_P: Ints
    token_T: Ints
    behaviour_logprob_T: Floats | None  # None: given, not sampled
    lag_T: Ints
    place_N: NDArray[np.int64]  # of its loss tokens among the T; at least one
    advantage: float = 0.0
    weight_N: Floats | None = None  # of its loss tokens, once the batch is known

    @property
    def rows(self) -> int:
        """Rows it takes in a packed batch: its last loss token, and what follows, is never read."""
        return int(self.place_N[-1])


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
    groups: tuple[int, ...]  # places in the batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembled:
    """The batch of one step."""

    microbatches: tuple[Microbatch, ...]
    tokens: int  # in the loss, those of skipped groups among them
    masked_tokens: int  # sampled, left out for their age or for want of a verdict
    invalid: int  # rollouts without a verdict
    skipped_groups: int  # of zero advantage, where that is exactly zero loss
    rows: int  # of all micro-batches
    unpacked_rows: int  # the same if every response carried its own prompt
    padding_share: float  # of the rows that attention works on; all else works on unpadded rows
    reward: float  # mean over valid rollouts
    reward_std: float
    length: float  # mean response length of valid rollouts, tokens
    scores: Mapping[str, float]  # prompt id -> mean score


def lags_of(group: Group, lag: Sequence[int]) -> list[Ints]:
    """Per rollout, lag_T: the lags of a group's version runs, in rollout order, spread over their tokens."""
    runs = [run for rollout in group.rollouts for run in rollout.versions]
    if len(runs) != len(lag):
        raise TrainingError(
            f"{group.id}: {len(lag)} lags were sent for {len(runs)} version runs; the queue and the"
            " learner do not run the same release"
        )
    lag_T = np.repeat(np.array(lag, np.int32), [run.end - run.start for run in runs])
    return np.split(lag_T, np.cumsum([len(rollout) for rollout in group.rollouts])[:-1])


def valid_members(group: Group, verdicts: Sequence[Verdict]) -> tuple[Group, list[Verdict], list[int]]:
    """The group of members that have a score, their verdicts, and their places in the full group."""
    places = [at for at, verdict in enumerate(verdicts) if verdict.kind is not VerdictKind.JUDGE_FAILED]
    members = replace(group, rollouts=tuple(group.rollouts[at] for at in places))
    return members, [verdicts[at] for at in places], places


def reward_of(group: Group, verdict: GroupVerdict, *, shape: Shape = scores) -> Floats:
    """reward_G of a group's valid members.

    Raises:
        TrainingError: verdict and group do not belong together, or the shaping returned nonsense.
    """
    if verdict.id != group.id or len(verdict.verdicts) != len(group.rollouts):
        raise TrainingError(f"{group.id} came with the {len(verdict.verdicts)} verdicts of {verdict.id}")
    members, kept, _ = valid_members(group, verdict.verdicts)
    reward_G = np.asarray(shape(members, kept), np.float32)
    if reward_G.shape != (len(kept),) or not np.isfinite(reward_G).all():
        raise TrainingError(
            f"{group.id} (prompt {group.prompt.id}): shaping made rewards {reward_G.tolist()} of {len(kept)} scores;"
            " it must return one finite number per rollout"
        )
    return reward_G


def assemble(
    groups: Sequence[Group],
    verdicts: Sequence[GroupVerdict],
    lag: Sequence[Sequence[int]],
    rewards: Sequence[Floats],
    objective: Advantages,
    *,
    token_budget: int,
    mask_above: int | None = None,
) -> Assembled:
    """Pack the groups of one step.

    Args:
        groups, verdicts, lag: as the queue hands them out.
        rewards: reward_G of the valid members of each group, from `reward_of`.
        objective: makes advantages of rewards, and token weights of sequences.
        token_budget: rows of a micro-batch; only a single response that is longer exceeds it.
        mask_above: tokens of a greater lag leave the loss; None: none does.
    """
    samples: list[Sample] = []
    lengths: list[int] = []
    masked = 0
    for index, (group, verdict, runs, reward_G) in enumerate(zip(groups, verdicts, lag, rewards, strict=True)):
        members, _, places = valid_members(group, verdict.verdicts)
        length_G = np.array([len(rollout) for rollout in members.rollouts], np.int64)
        advantage_G = objective.advantages({"reward_G": reward_G, "length_G": length_G})
        lags = lags_of(group, runs)
        lengths += length_G.tolist()
        valid = set(places)
        masked += sum(int(r.sampled_T.sum()) for place, r in enumerate(group.rollouts) if place not in valid)
        for rollout, place, advantage in zip(members.rollouts, places, advantage_G.tolist(), strict=True):
            sample, stale = _sample(index, group, rollout, lags[place], advantage, mask_above)
            masked += stale
            if len(sample.place_N):
                samples.append(sample)
    weigh(samples, objective)
    useful = _useful(samples, objective)
    microbatches = tuple(pack(part) for part in split(useful, token_budget))
    padded = sum(micro.plan.padded_cells for micro in microbatches)
    reward = np.concatenate([*rewards, np.empty(0, np.float32)])
    return Assembled(
        microbatches=microbatches,
        tokens=sum(len(sample.place_N) for sample in samples),
        masked_tokens=masked,
        invalid=sum(len(group.rollouts) for group in groups) - len(lengths),
        skipped_groups=len({sample.group for sample in samples}) - len({sample.group for sample in useful}),
        rows=sum(len(micro.token_C) for micro in microbatches),
        unpacked_rows=sum(sample.rows + len(sample.prompt_P) for sample in useful),
        padding_share=1 - sum(m.plan.cells for m in microbatches) / padded if padded else 0.0,
        reward=float(reward.mean()) if len(reward) else 0.0,
        reward_std=float(reward.std()) if len(reward) else 0.0,
        length=float(np.mean(lengths)) if lengths else 0.0,
        scores=_mean_by_prompt(groups, verdicts),
    )


def _sample(
    index: int, group: Group, rollout: Rollout, lag_T: Ints, advantage: float, mask_above: int | None
) -> tuple[Sample, int]:
    """One response, and how many of its sampled tokens leave the loss for their lag."""
    loss_T = rollout.sampled_T
    if mask_above is not None:
        loss_T = loss_T & (lag_T <= mask_above)
    sample = Sample(
        group=index,
        prompt_P=group.prompt.tokens_P,
        token_T=rollout.tokens_T,
        behaviour_logprob_T=rollout.behaviour_logprob_T,
        lag_T=lag_T,
        place_N=np.flatnonzero(loss_T),
        advantage=advantage,
    )
    return sample, int(rollout.sampled_T.sum()) - len(sample.place_N)


def _mean_by_prompt(groups: Sequence[Group], verdicts: Sequence[GroupVerdict]) -> dict[str, float]:
    by_prompt: dict[str, list[float]] = {}
    for group, verdict in zip(groups, verdicts, strict=True):
        valid = [v.score for v in verdict.verdicts if v.score is not None]
        by_prompt.setdefault(group.prompt.id, []).extend(valid)
    return {prompt: float(np.mean(valid)) for prompt, valid in by_prompt.items() if valid}


def weigh(samples: Sequence[Sample], objective: Weights) -> None:
    """Give every loss token its weight. Denominators run over the whole batch, whatever is skipped later."""
    if not samples:
        return
    lengths_S = np.array([len(sample.place_N) for sample in samples], np.int64)
    group_S = np.array([sample.group for sample in samples], np.int64)
    weight_N = objective.token_weights(Sequences(lengths_S), group_S=group_S)
    for sample, weights in zip(samples, np.split(weight_N, np.cumsum(lengths_S)[:-1]), strict=True):
        sample.weight_N = weights


def _useful(samples: Sequence[Sample], objective: Advantages) -> list[Sample]:
    """Without groups whose every advantage is zero, where the objective says that their loss is zero then."""
    if not objective.zero_advantage_is_zero_loss:
        return list(samples)
    live = {sample.group for sample in samples if sample.advantage != 0.0}
    return [sample for sample in samples if sample.group in live]


def split(samples: Sequence[Sample], token_budget: int) -> list[list[Sample]]:
    """Micro-batches: first fit, largest first. A group stays whole unless it exceeds the budget alone.

    A single response longer than the budget is a micro-batch of its own.
    """
    pieces: list[tuple[int, list[Sample]]] = []  # rows, samples of one group
    for sample in samples:
        rows = pieces[-1][0] + sample.rows if pieces and pieces[-1][1][0].group == sample.group else None
        if rows is None or rows > token_budget:
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
    lengths_S = np.array([len(sample.place_N) for sample in samples], np.int64)
    return Microbatch(
        token_C=np.concatenate(tokens).astype(np.int64),
        position_C=np.arange(row) - np.repeat(np.cumsum(length_R) - length_R - first_R, length_R),
        plan=Plan.of(spans),
        row_N=np.concatenate(rows_N),
        token_N=np.concatenate([s.token_T[s.place_N] for s in samples]).astype(np.int64),
        sequences=Sequences(lengths_S),
        behaviour_logprob_N=_behaviour(samples),
        advantage_N=np.repeat(np.array([s.advantage for s in samples], np.float32), lengths_S),
        weight_N=np.concatenate([_weights(s) for s in samples]).astype(np.float32),
        staleness_N=np.concatenate([s.lag_T[s.place_N] for s in samples]),
        groups=tuple(dict.fromkeys(s.group for s in samples)),
    )


def _behaviour(samples: Sequence[Sample]) -> Floats | None:
    parts = [s.behaviour_logprob_T[s.place_N] for s in samples if s.behaviour_logprob_T is not None]
    return np.concatenate(parts).astype(np.float32) if len(parts) == len(samples) else None


def _weights(sample: Sample) -> Floats:
    assert sample.weight_N is not None, "weigh the batch before it is packed"
    return sample.weight_N
