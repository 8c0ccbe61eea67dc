"""learner/proximals/: stand-ins for the policy as the step began."""

import numpy as np
import torch

from millrace.learner.objective import Objective
from millrace.learner.proximals import interpolated
from millrace.learner.sequences import Sequences

NEW = torch.tensor([0.5, 0.2, 0.8, 0.1]).log()
OLD = torch.tensor([0.25, 0.4, 0.2, 0.5]).log()
AGE = torch.tensor([0, 1, 2, 4])


def test_interpolated_by_hand() -> None:
    # alpha 1, 1, 1/2, 1/4: the sampler's twice, log sqrt(0.8 * 0.2) = log 0.4, and 1/4 log 0.5 + 3/4 log 0.1
    expected = [np.log(0.25), np.log(0.4), np.log(0.4), -1.90022579]
    np.testing.assert_allclose(interpolated(NEW, OLD, AGE).numpy(), expected, rtol=1e-6)


def test_it_carries_no_gradient() -> None:
    assert not interpolated(NEW.clone().requires_grad_(), OLD, AGE).requires_grad


def test_a_fresh_token_has_the_whole_ratio_and_a_stale_one_its_share() -> None:
    """ratio = (pi / mu)^alpha, correction (pi / mu)^(1 - alpha): their product is the whole importance weight."""
    objective = Objective.of(
        {
            "proximal": "interpolated",
            "surrogate": "policy_gradient",
            "corrections": {"name": "truncated_importance", "cap": 100.0},
        }
    )
    x = NEW.double().requires_grad_()
    have = {
        "logprob_N": x,
        "behaviour_logprob_N": OLD.double(),
        "staleness_N": AGE,
        "advantage_N": torch.ones(4, dtype=torch.float64),
        "weight_N": torch.ones(4, dtype=torch.float64),
        "sequences": Sequences([4]),
    }
    (gradient,) = torch.autograd.grad(objective(have).value, x)
    np.testing.assert_allclose(gradient.numpy(), -np.exp(NEW.double().numpy() - OLD.double().numpy()), rtol=1e-6)
    ratio = objective(have).metrics["ratio"].value
    np.testing.assert_allclose(ratio, np.mean([2, 0.5, 4**0.5, 0.2**0.25]), rtol=1e-6)
    assert "proximal_logprob_N" not in objective.scores_before  # no forward pass for it
