"""Maximum likelihood of given answers, by hand and by effect."""

import numpy as np
import pytest
import torch

from millrace.core.errors import DataError, RecipeError
from millrace.core.types import Prompt
from millrace.learner.config import SupervisedConfig
from millrace.learner.model import Policy, load_model
from millrace.learner.supervised import train_supervised
from millrace.learner.table_model import TableConfig, TableForCausalLM

CONFIG = SupervisedConfig(learning_rate=0.01, epochs=1, batch_rows=3, threads=1, device="cpu")


@pytest.fixture
def rows(tokenizer) -> list[Prompt]:
    texts = [("ab", "ba"), ("c", "cccc"), ("bca", "cab"), ("aa", "b")]
    return [
        Prompt(id=f"rows:{i}", text=p, tokens_P=np.array(tokenizer(p)["input_ids"], np.int32), answer=a)
        for i, (p, a) in enumerate(texts)
    ]


def test_the_first_loss_is_the_mean_over_answer_tokens_and_their_end(rows, make_model, model_dir, tmp_path, tokenizer):
    model = make_model("qwen2")
    result = train_supervised(
        model_dir(model), rows, str(tmp_path / "out"), CONFIG.model_copy(update={"batch_rows": 4})
    )
    model.set_attn_implementation("sdpa")
    total, count = 0.0, 0
    for row in rows:
        answer = [*tokenizer(row.answer)["input_ids"], tokenizer.eos_token_id]
        full = torch.tensor([[*row.tokens_P.tolist(), *answer]])
        logprobs = torch.log_softmax(model(full).logits[0, :-1], -1).gather(1, full[0, 1:, None])[:, 0]
        total -= logprobs[-len(answer) :].sum().item()
        count += len(answer)
    assert (result.steps, result.rows, result.tokens) == (1, 4, count)
    assert result.first_loss == pytest.approx(total / count, rel=1e-5)


def test_it_learns_the_answers_and_saves_what_loads(rows, make_model, model_dir, tmp_path):
    steps = []
    config = CONFIG.model_copy(update={"epochs": 60})
    result = train_supervised(
        model_dir(make_model("qwen2")), rows, str(tmp_path / "out"), config, on_step=lambda n, numbers: steps.append(n)
    )
    assert steps == list(range(1, 121)) and result.steps == 120
    assert result.last_loss < 0.2 < 2 < result.first_loss
    policy = Policy(load_model(result.directory, device=torch.device("cpu")))
    learnt = np.concatenate([rows[0].tokens_P, [4, 3, 2]]).astype(np.int32)
    assert policy.score(learnt)[-3:].min() > -0.7


def test_it_ends_when_told_to_and_saves_what_it_learnt(rows, model_dir, tmp_path):
    table = TableForCausalLM(TableConfig(vocab_size=61, positions=8))
    result = train_supervised(
        model_dir(table), rows, str(tmp_path / "out"), CONFIG, on_step=lambda step, numbers: step == 1
    )
    assert (result.steps, result.rows) == (1, 3)
    assert load_model(result.directory, device=torch.device("cpu")).table.abs().sum() > 0


def test_the_same_seed_gives_the_same_bits_and_another_order_does_not(rows, make_model, model_dir, tmp_path):
    source = model_dir(make_model("qwen2"))
    outcomes = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        config = CONFIG.model_copy(update={"seed": seed, "epochs": 2})
        result = train_supervised(source, rows, str(tmp_path / name), config)
        outcomes.append(load_model(result.directory, device=torch.device("cpu")).model.embed_tokens.weight)
    assert torch.equal(outcomes[0], outcomes[1]) and not torch.equal(outcomes[0], outcomes[2])


def test_a_table_learns_too(rows, model_dir, tmp_path):
    table = TableForCausalLM(TableConfig(vocab_size=61, positions=8, eos_token_id=2))
    config = CONFIG.model_copy(update={"epochs": 30, "learning_rate": 0.3})
    result = train_supervised(model_dir(table), rows, str(tmp_path / "out"), config)
    assert result.last_loss < 0.7 < result.first_loss


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda rows: [], DataError, "was given no rows; it needs prompts with answers"),
        (lambda rows: [*rows, Prompt(id="rows:4", text="", tokens_P=rows[0].tokens_P)], DataError, "row rows:4 has no"),
        (
            lambda rows: [Prompt(id="long", text="", tokens_P=rows[0].tokens_P, answer="a" * 300)],
            DataError,
            "row long: 2 tokens of prompt and 301 of answer exceed the model's context of 256",
        ),
    ],
)
def test_rows_that_cannot_be_trained_on_are_named(change, error, message, rows, make_model, model_dir, tmp_path):
    with pytest.raises(error, match=message):
        train_supervised(model_dir(make_model("qwen2")), change(rows), str(tmp_path / "out"), CONFIG)


def test_an_objective_that_needs_rewards_is_refused(rows, tmp_path):
    with pytest.raises(RecipeError, match="has no rewards; give it a whole loss"):
        train_supervised("nowhere", rows, str(tmp_path), CONFIG, objective={"advantage": "grpo"})
