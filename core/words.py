"""The words a method may ask for: positional parameters of these names are filled in.

Shapes are in the names: G rollouts of one group, S sequences of a batch, N tokens, packed end to end, so that there is
no padding and no mask. Of a group they are all response tokens, of a batch its loss tokens: sampled and not masked.
Log-probabilities are nats.
"""

from collections.abc import Mapping

GROUP: Mapping[str, str] = {
    "reward_G": "reward of each validly judged rollout of the group, any unit",
    "length_G": "response tokens of each of them",
    "truncated_G": "whether each of them ended at the length limit",
    "step": "optimiser steps made before this batch",
    "sequences": "which tokens belong to which rollout: learner/sequences.py",
    "behaviour_logprob_N": "log-probability of each token under the weights that sampled it",
    "proximal_logprob_N": "the same under the policy as the step began",
    "reference_logprob_N": "the same under the reference model",
    "staleness_N": "lag of the weights that sampled each token, in published versions",
}

JUDGED: Mapping[str, str] = {
    "score_G": "score that the verifier gave each of them, before any shaping",
    "text_G": "text of each response, special tokens left out",
    "components_G": "a mapping: the verdicts' named parts, one number per rollout, nan where a verdict lacks it",
    "failed_G": "whether each response could not be judged for a fault of its own",
    "answer": "of the prompt's row; None where it has none",
    "prompt": "its text, as it was tokenised",
    "row": "the further columns of its row",
    "max_tokens": "the longest response that sampling allows",
}

TOKENS: Mapping[str, str] = {
    "logprob_N": "log-probability of each token under the policy; carries the gradient",
    "proximal_logprob_N": "the same under the policy as the step began, or what the recipe takes for it; no gradient",
    "behaviour_logprob_N": "the same under the weights that sampled it, as the engine reported it; no gradient",
    "reference_logprob_N": "the same under the reference model; no gradient",
    "entropy_N": "entropy of the policy's distribution each token was drawn from, nats; carries the gradient",
    "advantage_N": "advantage of each token; no gradient",
    "ratio_N": "what the recipe's ratio made of the log-probabilities; carries the gradient",
    "staleness_N": "lag of the weights that sampled each token, in published versions",
    "sequences": "which tokens belong together: learner/sequences.py",
    "group_S": "index of each sequence's group; whoever asks for it finds groups whole",
    "reward_S": "shaped reward of each sequence; no gradient",
    "step": "optimiser steps made before this batch",
}

BATCH: Mapping[str, str] = {
    "sequences": "the sequences of the whole batch",
    "group_S": "index of each sequence's group",
}

# What a forward pass yields. Everything else comes with the data or is made of these.
FROM_MODEL = frozenset({"logprob_N", "entropy_N", "reference_logprob_N"})

# Of a group's words, those that a forward pass before the step yields.
SCORED = frozenset({"proximal_logprob_N", "reference_logprob_N"})

# Words that a second model must supply -> the run's key for that model.
NEEDS_MODEL: Mapping[str, str] = {"reference_logprob_N": "reference"}

# What each slot of a recipe may ask for.
SLOTS: Mapping[str, frozenset[str]] = {
    "shaper": frozenset(GROUP) | frozenset(JUDGED),
    "filter": frozenset(GROUP) | frozenset(JUDGED),
    "selection": frozenset(GROUP),
    "advantage": frozenset(GROUP),
    "normaliser": frozenset(BATCH) | {"advantage_N"},
    "proximal": frozenset({"logprob_N", "behaviour_logprob_N", "staleness_N", "sequences", "step"}),
    "ratio": frozenset(TOKENS) - {"ratio_N"},
    "surrogate": frozenset(TOKENS),
    "correction": frozenset(TOKENS),
    "penalty": frozenset(TOKENS),
    "aggregation": frozenset(BATCH),
    "objective": frozenset(TOKENS) - {"ratio_N", "advantage_N"},
    "reference": frozenset({"step"}),
}
