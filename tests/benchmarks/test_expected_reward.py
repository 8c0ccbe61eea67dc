"""The reward without sampling is the probability of the right answer."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks.expected_reward import expected_reward, problems

VOCABULARY = 5


class Tokenizer:
    """Digits are tokens; 4 is the end."""

    eos_token_id = 4

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [int(digit) for digit in text]}


class Model:
    """The token after t is (t + 1) % 5 with probability 0.9, each of the others 0.025."""

    def __call__(self, *, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        chosen = torch.nn.functional.one_hot((input_ids + 1) % VOCABULARY, VOCABULARY).bool()
        return SimpleNamespace(logits=torch.where(chosen, 0.9, 0.025).log())


def test_it_is_the_product_over_the_answer_and_its_end() -> None:
    rows = [{"prompt": "0", "answer": "123"}, {"prompt": "31", "answer": "2"}]
    asked = problems(Tokenizer(), rows)
    assert asked == [([3, 1], [2, 4]), ([0], [1, 2, 3, 4])]
    assert expected_reward(Model(), asked) == pytest.approx((0.9 * 0.025 + 0.9**4) / 2, rel=1e-6)


def test_batches_do_not_change_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": "0", "answer": "1" * (1 + n % 4)} for n in range(7)]
    asked = problems(Tokenizer(), rows)
    whole = expected_reward(Model(), asked)
    monkeypatch.setattr("benchmarks.expected_reward.BATCH_ROWS", 2)
    assert expected_reward(Model(), asked) == pytest.approx(whole, rel=1e-6)
