"""The held-out reward of a policy on a task with one right answer, without sampling: what both arms are scored by.

A response sampled at temperature 1 is right with the probability of the right answer's tokens and of the end after
them, so that the mean reward over infinitely many samples per prompt is known from one forward pass.

Needs torch only: TRL's environment imports it, too.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

BATCH_ROWS = 50
Problem = tuple[list[int], list[int]]  # tokens of the prompt, and of the right answer with the end


def problems(tokenizer: Any, rows: Iterable[Mapping[str, str]]) -> list[Problem]:
    """The rows in tokens, short ones first, so that a batch of them is hardly padded."""
    end = [tokenizer.eos_token_id]
    found = [(tokenizer(row["prompt"])["input_ids"], tokenizer(row["answer"])["input_ids"] + end) for row in rows]
    return sorted(found, key=lambda problem: len(problem[0]) + len(problem[1]))


@torch.inference_mode()
def expected_reward(model: Any, problems: Sequence[Problem]) -> float:
    """The mean over the problems of the probability of the right answer.

    Args:
        model: a Hugging Face causal LM whose dropout is off.
    """
    right = 0.0
    for at in range(0, len(problems), BATCH_ROWS):
        batch = problems[at : at + BATCH_ROWS]
        longest = max(len(prompt) + len(answer) for prompt, answer in batch)
        # A causal model sees nothing of the padding behind.
        ids_RT = torch.tensor(
            [prompt + answer + [0] * (longest - len(prompt) - len(answer)) for prompt, answer in batch]
        )
        answers_RT = torch.tensor(
            [[len(prompt) <= t < len(prompt) + len(answer) for t in range(1, longest)] for prompt, answer in batch]
        )
        logits_RTV = model(input_ids=ids_RT, use_cache=False).logits[:, :-1].float()
        logprob_RT = torch.log_softmax(logits_RTV, dim=-1).gather(2, ids_RT[:, 1:, None])[..., 0]
        right += float((logprob_RT.double() * answers_RT).sum(dim=1).exp().sum())
    return right / len(problems)
