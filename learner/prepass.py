"""A forward pass before the step: log-probabilities of every response token, for whoever asks before there is a loss.

The divergence in a reward, returns per token, and the proximal policy of several optimiser steps on one batch.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from millrace.core.types import Floats
from millrace.learner.assemble import Sample, pack, split
from millrace.learner.judged import Judged
from millrace.learner.model import Policy


def score(policy: Policy, groups: Sequence[Judged], words: frozenset[str], *, token_budget: int) -> list[Judged]:
    """The groups with `scored` filled in.

    Args:
        words: of core/words.py SCORED.
        token_budget: rows of one forward pass.
    """
    if not words:
        return list(groups)
    samples = [_sample(at, group, member) for at, group in enumerate(groups) for member in range(len(group.places))]
    whole = [sample for sample in samples if len(sample.place_N)]
    lengths = [group.sequences.total for group in groups]
    found: dict[str, list[Floats]] = {word: [np.empty(n, np.float32) for n in lengths] for word in words}
    starts = {id(sample): start for sample, start in zip(samples, _starts(groups), strict=True)}
    for part in split(whole, token_budget):
        values = policy.scores(pack(part), words)
        for word, value_N in values.items():
            for sample, own in zip(part, np.split(value_N, np.cumsum([s.length for s in part])[:-1]), strict=True):
                start = starts[id(sample)]
                found[word][sample.group][start : start + sample.length] = own
    return [replace(group, scored={word: found[word][at] for word in words}) for at, group in enumerate(groups)]


def _sample(at: int, group: Judged, member: int) -> Sample:
    rollout = group.members.rollouts[member]
    return Sample(
        group=at,
        prompt_P=group.members.prompt.tokens_P,
        token_T=rollout.tokens_T,
        behaviour_logprob_T=None,
        lag_T=group.lags[group.places[member]],
        place_N=np.arange(len(rollout)),
    )


def _starts(groups: Sequence[Judged]) -> list[int]:
    """Of each member's tokens among those of its group."""
    return [
        int(start) for group in groups for start in np.cumsum(group.sequences.lengths_S) - group.sequences.lengths_S
    ]
