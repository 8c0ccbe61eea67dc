"""The reference model, where it follows the policy."""

import torch
from transformers import PreTrainedModel

from millrace.learner.model import Policy


def move(reference: PreTrainedModel, policy: Policy, share: float) -> None:
    """Move every parameter of the reference a share of the way to the policy's, in place.

        reference <- reference + share * (policy - reference)

    Args:
        reference: of the policy's architecture, by the parameters' names.
        policy: its weights; adapters count as merged.
        share: in [0, 1]; 1 copies.
    """
    left = dict(reference.named_parameters())
    with torch.no_grad():
        for name, source in policy.weights():  # one at a time: where adapters are merged, each is made here
            if (parameter := left.pop(name, None)) is None:
                continue  # tied to one that was there already
            if share == 1.0:
                parameter.copy_(source)
            else:
                parameter.lerp_(source.to(parameter.device), share)
    assert not left, f"the policy has no {', '.join(left)}"
