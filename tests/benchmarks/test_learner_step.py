"""Both arms of the learner's benchmark make the same step."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import learner_step
from examples import tiny_model
from millrace.core.recipe import load
from millrace.learner.objective import Objective


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("learner_step")
    tiny_model.build(directory)
    return str(directory)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", [learner_step.SHORT, learner_step.LONG_TAIL])
def test_losses_agree_and_the_details_are_there(kind: str, model: str) -> None:
    found, details = learner_step.compare(kind, model, pairs=1, warm=0)
    assert found.median > 0
    assert float(str(details["largest_loss_gap"])) <= learner_step.LOSS_GAP
    assert float(str(details["rows_padded_over_packed"])) > 1
    assert {"plain_ms", "ours_ms", "pairs", "limit"} <= set(details)


def test_one_step_from_the_same_weights_leads_to_the_same_weights(model: str) -> None:
    objective = Objective.of(load("grpo", root=Path.cwd()).objective)
    ours, plain = learner_step.Ours(model, objective), learner_step.Plain(model, objective)
    data = learner_step.batch(learner_step.LONG_TAIL, learner_step.np.random.default_rng(3), 100)
    before = {name: value.clone() for name, value in ours.model.state_dict().items()}
    assert ours.step(data) == pytest.approx(plain.step(data), abs=learner_step.LOSS_GAP)
    theirs = plain.model.state_dict()
    # AdamW's first step is the sign of the gradient: where a gradient is rounding noise, so is the sign.
    differ = sum(int((value - theirs[name]).abs().gt(1e-6).sum()) for name, value in ours.model.state_dict().items())
    moved = sum(int((value != before[name]).sum()) for name, value in ours.model.state_dict().items())
    assert moved > 10_000
    assert differ < moved / 1000
    assert all(torch.isfinite(value).all() for value in theirs.values())
