"""A forward pass before the step gives what the step itself would see, token by token."""

import numpy as np
import pytest

from millrace.learner.assemble import Sample, pack
from millrace.learner.judged import Judged
from millrace.learner.model import Policy
from millrace.learner.prepass import score


@pytest.mark.parametrize("token_budget", [10_000, 12])
def test_every_response_token_is_scored_where_it_stands(token_budget, group_of, judged, make_model):
    rng = np.random.default_rng(4)
    groups = [group_of(0, 4, (3, 1, 5), rng), group_of(1, 2, (2, 6), rng)]
    verdicts = [judged(groups[0], (1.0, None, 0.0)), judged(groups[1], (0.0, 1.0))]
    found = [Judged.of(*each, [0] * len(each[0].rollouts)) for each in zip(groups, verdicts, strict=True)]
    policy = Policy(make_model("qwen2"), reference=make_model("qwen2", seed=1), temperature=0.7)
    scored = score(policy, found, frozenset({"proximal_logprob_N", "reference_logprob_N"}), token_budget=token_budget)
    for before, after in zip(found, scored, strict=True):
        alone = [one_by_one(policy, before.members.prompt.tokens_P, r.tokens_T) for r in before.members.rollouts]
        for word in ("proximal_logprob_N", "reference_logprob_N"):
            expected = np.concatenate([each[word] for each in alone])
            np.testing.assert_allclose(after.scored[word], expected, atol=1e-5)
            np.testing.assert_array_equal(after.words(step=0)[word], after.scored[word])
    assert len(scored[0].scored["proximal_logprob_N"]) == 8, "the rollout without a verdict is not among them"


def one_by_one(policy, prompt_P, token_T):
    sample = Sample(
        group=0,
        prompt_P=prompt_P,
        token_T=token_T,
        behaviour_logprob_T=None,
        lag_T=np.zeros(len(token_T), np.int32),
        place_N=np.arange(len(token_T)),
    )
    return policy.scores(pack([sample]), ("proximal_logprob_N", "reference_logprob_N"))


def test_nothing_is_computed_for_nobody(group_of, judged):
    group = group_of(0, 2, (2, 2), np.random.default_rng(0))
    found = [Judged.of(group, judged(group, (1.0, 0.0)), [0, 0])]
    assert score(None, found, frozenset(), token_budget=1) == found
