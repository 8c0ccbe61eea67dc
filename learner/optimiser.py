"""AdamW on float32 master weights, clipping by global norm, learning-rate schedules."""

import math
from collections.abc import Callable, Iterable

import torch

from millrace.core.errors import ConfigError, TrainingError
from millrace.learner.config import OptimiserConfig, Schedule


def rate_factor(step: int, config: OptimiserConfig) -> float:
    """Share of the peak learning rate at a step, the first being 0.

        warm-up: (step + 1) / warmup_steps
        then, with x from 0 to 1 up to decay_steps and f = final_ratio:
        linear: 1 - (1 - f) x        cosine: f + (1 - f) (1 + cos(pi x)) / 2

    >>> config = OptimiserConfig(schedule="linear", warmup_steps=2, decay_steps=6)
    >>> [rate_factor(step, config) for step in (0, 1, 2, 4, 6, 9)]
    [0.5, 1.0, 1.0, 0.5, 0.0, 0.0]
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.decay_steps is None or config.schedule is Schedule.CONSTANT:
        return 1.0
    x = min(1.0, (step - config.warmup_steps) / (config.decay_steps - config.warmup_steps))
    left = 1 - x if config.schedule is Schedule.LINEAR else (1 + math.cos(math.pi * x)) / 2
    return config.final_ratio + (1 - config.final_ratio) * left


class GradientRefused(TrainingError):
    """The gradient is not finite, or larger than the run allows. The weights stay as they were."""


class Optimiser:
    """AdamW over named parameters.

    Args:
        named: names and parameters, ties once; kept in this order.
        config: of the method.
    Raises:
        ConfigError: a schedule without an end.
    """

    def __init__(self, named: Iterable[tuple[str, torch.nn.Parameter]], config: OptimiserConfig) -> None:
        if config.schedule is not Schedule.CONSTANT and config.decay_steps is None:
            raise ConfigError(f"schedule = '{config.schedule}' needs decay_steps: the optimiser step at which it ends")
        self.config = config
        self.names, parameters = zip(*((n, p) for n, p in named if p.requires_grad), strict=True)
        self.parameters: tuple[torch.nn.Parameter, ...] = parameters
        self.steps = 0
        matrices = [p for p in parameters if p.ndim >= 2]
        vectors = [p for p in parameters if p.ndim < 2]
        self._adamw = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": config.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            betas=config.betas,
            eps=config.epsilon,
            fused=True,
        )

    def step(self, *, where: Callable[[], str], refuse_above: float | None = None) -> float:
        """Clip, update, clear the gradients. Returns the gradient's norm before clipping.

        Args:
            where: names the batch, for the message.
            refuse_above: a gradient of a larger norm makes no step; None: every finite one does.
        Raises:
            GradientRefused: it is not finite or too large; weights, moments and their count stay as they were.
        """
        # What no loss reached has the gradient zero: moments and decay go on as for everything else.
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        value = float(norm)
        if not math.isfinite(value):
            bad = [n for n, p in zip(self.names, self.parameters, strict=True) if not torch.isfinite(p.grad).all()]  # type: ignore[arg-type]  # set above
            self.clear()
            raise GradientRefused(
                f"the gradient's norm is {value} at {where()}: not finite in {', '.join(bad[:3]) or 'their sum'};"
                " the step was not made. Lower the learning rate, or look at these groups' rewards"
            )
        if refuse_above is not None and value > refuse_above:
            self.clear()
            raise GradientRefused(
                f"the gradient's norm is {value:g} at {where()}: above skip_gradient_above = {refuse_above:g};"
                " the step was not made. Raise it, lower the learning rate, or look at these groups' rewards"
            )
        torch.nn.utils.clip_grads_with_norm_(self.parameters, self.config.clip_norm, norm)
        for group in self._adamw.param_groups:
            group["lr"] = self.learning_rate
        self._adamw.step()
        self.steps += 1
        self.clear()
        return value

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return self.config.learning_rate * rate_factor(self.steps, self.config)

    def clear(self) -> None:
        """Forget gradients."""
        self._adamw.zero_grad(set_to_none=True)

    def state(self) -> dict[str, torch.Tensor]:
        """Both moments by parameter name, and the count of steps."""
        tensors = {"steps": torch.tensor(self.steps)}
        for name, parameter in zip(self.names, self.parameters, strict=True):
            held = self._adamw.state.get(parameter)
            if held:
                tensors[f"first.{name}"] = held["exp_avg"]
                tensors[f"second.{name}"] = held["exp_avg_sq"]
        return tensors

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Continue from `state`.

        Raises:
            TrainingError: it is another model's.
        """
        self.steps = int(tensors["steps"])
        expected = (
            {f"{moment}.{name}" for moment in ("first", "second") for name in self.names} if self.steps else set()
        )
        if set(tensors) - {"steps"} != expected:
            odd = sorted((set(tensors) - {"steps"}) ^ expected)
            raise TrainingError(
                f"the optimiser's state does not fit the model: {len(odd)} names differ, such as {odd[0]};"
                " resume with the model that the run was started with"
            )
        if not self.steps:
            return
        for name, parameter in zip(self.names, self.parameters, strict=True):
            self._adamw.state[parameter] = {
                "step": torch.tensor(float(self.steps), device=parameter.device),
                "exp_avg": tensors[f"first.{name}"].to(parameter.device, copy=True),
                "exp_avg_sq": tensors[f"second.{name}"].to(parameter.device, copy=True),
            }
