"""AdamW, clipping and schedules against their formulas."""

import math

import pytest
import torch

from millrace.core.errors import ConfigError, TrainingError
from millrace.learner.config import OptimiserConfig
from millrace.learner.optimiser import Optimiser, rate_factor


def parameters() -> list[tuple[str, torch.nn.Parameter]]:
    torch.manual_seed(0)
    return [("matrix", torch.nn.Parameter(torch.randn(3, 2))), ("norm", torch.nn.Parameter(torch.randn(2)))]


def config(**settings) -> OptimiserConfig:
    return OptimiserConfig(**{"learning_rate": 0.1, "clip_norm": 1e9, **settings})


def where() -> str:
    return "step 3: draw 1 attempt 0"


def test_the_first_step_is_adamws_by_hand():
    named = parameters()
    before = {name: p.detach().clone() for name, p in named}
    optimiser = Optimiser(named, config(weight_decay=0.5, epsilon=1e-3))
    gradients = {name: torch.randn_like(p) for name, p in named}
    for name, p in named:
        p.grad = gradients[name].clone()
    norm = optimiser.step(where=where)
    assert norm == pytest.approx(math.sqrt(sum(float(g.square().sum()) for g in gradients.values())))
    for name, p in named:
        decayed = before[name] * (1 - 0.1 * 0.5 if name == "matrix" else 1.0)
        expected = decayed - 0.1 * gradients[name] / (gradients[name].abs() + 1e-3)
        torch.testing.assert_close(p.detach(), expected)
    assert all(p.grad is None for _, p in named)


def test_gradients_are_scaled_down_to_the_norm_and_never_up():
    outcomes = []
    for clip in (2.0, 1e9):
        named = parameters()
        optimiser = Optimiser(named, config(clip_norm=clip, epsilon=1.0))
        named[0][1].grad = torch.full((3, 2), 3.0)
        norm = optimiser.step(where=where)
        assert norm == pytest.approx(3 * math.sqrt(6))
        outcomes.append(optimiser.state()["first.matrix"])
    torch.testing.assert_close(outcomes[0], outcomes[1] * 2.0 / norm)


def test_what_no_loss_reached_still_decays_and_keeps_its_momentum():
    named = parameters()
    optimiser = Optimiser(named, config())
    named[0][1].grad = torch.ones(3, 2)
    optimiser.step(where=where)
    before = named[0][1].detach().clone()
    assert optimiser.step(where=where) == 0.0
    assert (named[0][1] < before).all(), "the first moment pushes on"


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_names_where_and_what_and_changes_nothing(poison):
    named = parameters()
    optimiser = Optimiser(named, config())
    before = [p.detach().clone() for _, p in named]
    for _, p in named:
        p.grad = torch.ones_like(p)
    named[1][1].grad[0] = poison
    with pytest.raises(TrainingError, match=r"at step 3: draw 1 attempt 0: not finite in norm; the step was not made"):
        optimiser.step(where=where)
    assert all(torch.equal(p, b) for (_, p), b in zip(named, before, strict=True))
    assert optimiser.steps == 0 and all(p.grad is None for _, p in named)


def test_schedules_at_their_corners():
    linear = config(schedule="linear", warmup_steps=4, decay_steps=14, final_ratio=0.2)
    assert [rate_factor(step, linear) for step in (0, 3, 4, 9, 14, 99)] == pytest.approx([0.25, 1, 1, 0.6, 0.2, 0.2])
    cosine = config(schedule="cosine", warmup_steps=0, decay_steps=10)
    assert [rate_factor(step, cosine) for step in (0, 5, 10)] == pytest.approx([1, 0.5, 0])
    assert rate_factor(10**6, config(warmup_steps=2)) == 1


def test_the_rate_follows_the_count_of_steps():
    optimiser = Optimiser(parameters(), config(warmup_steps=2))
    rates = []
    for _ in range(3):
        rates.append(optimiser.learning_rate)
        optimiser.step(where=where)
    assert rates == pytest.approx([0.05, 0.1, 0.1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "linear", "decay_steps": 3, "warmup_steps": 3}, "lies within warmup_steps = 3"),
        ({"lerning_rate": 1.0}, "did you mean 'learning_rate'"),
    ],
)
def test_settings_that_cannot_work_say_so(settings, message):
    with pytest.raises(ConfigError, match=message):
        OptimiserConfig.parse(settings, source="run.toml")


def test_the_state_continues_to_the_bit():
    def gradients(named, step):
        for place, (_, p) in enumerate(named):
            p.grad = torch.sin(torch.arange(p.numel(), dtype=torch.float32) + step + place).view_as(p)

    named = parameters()
    optimiser = Optimiser(named, config(schedule="linear", decay_steps=10))
    for step in range(2):
        gradients(named, step)
        optimiser.step(where=where)
    other = [(name, torch.nn.Parameter(p.detach().clone())) for name, p in named]
    resumed = Optimiser(other, optimiser.config)
    resumed.load({name: tensor.clone() for name, tensor in optimiser.state().items()})
    for pair, each in ((named, optimiser), (other, resumed)):
        gradients(pair, 7)
        each.step(where=where)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(named, other, strict=True))


def test_another_models_state_is_refused():
    optimiser = Optimiser(parameters(), config())
    optimiser.step(where=where)
    state = optimiser.state()
    state["first.head"] = state.pop("first.norm")
    with pytest.raises(TrainingError, match=r"2 names differ, such as first.head; resume with the model"):
        Optimiser(parameters(), config()).load(state)


def test_a_schedule_without_an_end_is_refused() -> None:
    named = [("weight", torch.nn.Parameter(torch.zeros(2, 2)))]
    with pytest.raises(ConfigError, match="schedule = 'cosine' needs decay_steps: the optimiser step at which it ends"):
        Optimiser(named, OptimiserConfig(schedule="cosine"))
