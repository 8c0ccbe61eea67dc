"""The words a method may ask for: positional parameters of these names are filled in.

Shapes are in the names: G rollouts of one group, S sequences of a batch, N its loss tokens: packed end to end,
sampled and not masked, so that there is no padding and no mask. Log-probabilities are nats.
"""

from collections.abc import Mapping

GROUP: Mapping[str, str] = {
    "reward_G": "reward of each validly judged rollout of the group, any unit",
    "length_G": "response tokens of each of them",
}

TOKENS: Mapping[str, str] = {
    "logprob_N": "log-probability of each token under the policy; carries the gradient",
    "proximal_logprob_N": "the same under the policy as the step began; no gradient",
    "behaviour_logprob_N": "the same under the weights that sampled it, as the engine reported it; no gradient",
    "reference_logprob_N": "the same under the reference model; no gradient",
    "entropy_N": "entropy of the policy's distribution each token was drawn from, nats; carries the gradient",
    "advantage_N": "advantage of each token's rollout; no gradient",
    "ratio_N": "what the recipe's ratio made of the log-probabilities; carries the gradient",
    "staleness_N": "lag of the weights that sampled each token, in published versions",
    "sequences": "which tokens belong together: learner/sequences.py",
}

BATCH: Mapping[str, str] = {
    "sequences": "the sequences of the whole batch",
    "group_S": "index of each sequence's group",
}

# What a forward pass yields. Everything else comes with the data or is made of these.
FROM_MODEL = frozenset({"logprob_N", "entropy_N", "reference_logprob_N"})

# Words that a second model must supply -> the run's key for that model.
NEEDS_MODEL: Mapping[str, str] = {"reference_logprob_N": "reference"}

# What each slot of an objective may ask for.
SLOTS: Mapping[str, frozenset[str]] = {
    "advantage": frozenset(GROUP),
    "ratio": frozenset(TOKENS) - {"ratio_N"},
    "surrogate": frozenset(TOKENS),
    "correction": frozenset(TOKENS),
    "penalty": frozenset(TOKENS),
    "aggregation": frozenset(BATCH),
    "objective": frozenset(TOKENS) - {"ratio_N", "advantage_N"},
}
