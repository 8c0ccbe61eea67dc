"""The head's log-probabilities chunk by chunk against full logits: memory, time, and both against float64."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.gpu.accelerator import Accelerator
from millrace.learner.logprobs import Head, chunk_of, logprobs_of_logits, token_logprobs

Scored = tuple[torch.Tensor, torch.Tensor]  # logprob_N, entropy_N
Path = Callable[["Problem"], Scored]


@dataclass(frozen=True, slots=True)
class Problem:
    """Hidden states, a head and tokens."""

    hidden_ND: torch.Tensor
    weight_VD: torch.Tensor
    token_N: torch.Tensor

    @staticmethod
    def of(tokens: int, hidden: int, vocabulary: int, device: torch.device) -> "Problem":
        """Random, in values that bfloat16 holds; logits spread by about 3 nats, as a trained model's do."""
        made = torch.Generator(device).manual_seed(0)
        hidden_ND = torch.randn(tokens, hidden, device=device, generator=made).bfloat16().float()
        weight_VD = (
            (torch.randn(vocabulary, hidden, device=device, generator=made) * 3 / hidden**0.5).bfloat16().float()
        )
        token_N = torch.randint(vocabulary, (tokens,), device=device, generator=made)
        return Problem(hidden_ND.requires_grad_(), weight_VD.requires_grad_(), token_N)

    def exact(self) -> "Problem":
        """The same in float64."""
        wide = (x.detach().double().requires_grad_() for x in (self.hidden_ND, self.weight_VD))
        return Problem(*wide, self.token_N)

    def step(self, path: Path) -> list[torch.Tensor]:
        """Forward and backward: log-probabilities, entropies, and the gradients of their weighted sum."""
        self.hidden_ND.grad = self.weight_VD.grad = None
        logprob_N, entropy_N = path(self)
        weight_N = torch.linspace(-1, 1, len(self.token_N), device=self.token_N.device)
        ((logprob_N + 0.01 * entropy_N) * weight_N).sum().backward()
        assert self.hidden_ND.grad is not None and self.weight_VD.grad is not None
        return [logprob_N.detach(), entropy_N.detach(), self.hidden_ND.grad, self.weight_VD.grad]


def chunked(problem: Problem, *, fused: bool = False, chunk: int | None = None) -> Scored:
    """The learner's own, products in bfloat16."""
    with torch.autocast(problem.token_N.device.type, dtype=torch.bfloat16):
        head = Head(weight_VD=problem.weight_VD)
        return token_logprobs(problem.hidden_ND, head, problem.token_N, fused=fused, chunk=chunk)


def fused(problem: Problem) -> Scored:
    """The same, compiled."""
    return chunked(problem, fused=True)


def full(problem: Problem) -> Scored:
    """All logits at a time, products in bfloat16."""
    with torch.autocast(problem.token_N.device.type, dtype=torch.bfloat16):
        logits_NV = problem.hidden_ND @ problem.weight_VD.T
    return logprobs_of_logits(logits_NV, problem.token_N)


def float64(problem: Problem) -> Scored:
    """Without rounding to speak of."""
    logprob_NV = torch.log_softmax(problem.hidden_ND @ problem.weight_VD.T, -1)
    return logprob_NV.gather(1, problem.token_N[:, None])[:, 0], -(logprob_NV.exp() * logprob_NV).sum(-1)


def errors(path: Path, problem: Problem, exact: list[torch.Tensor]) -> dict[str, float]:
    """Largest differences from float64 in nats, and of gradients relative to the exact one's norm."""
    logprob_N, entropy_N, *gradients = problem.step(path)
    found = {
        "logprob_nats": float((logprob_N - exact[0]).abs().max()),
        "entropy_nats": float((entropy_N - exact[1]).abs().max()),
    }
    for name, ours, theirs in zip(("hidden_gradient", "weight_gradient"), gradients, exact[2:], strict=True):
        found[name] = float((ours.double() - theirs).norm() / theirs.norm())
    return found


def correctness(accelerator: Accelerator, *, tokens: int, hidden: int, vocabulary: int) -> dict[str, dict[str, float]]:
    """`errors` of each path, the chunks being several."""
    problem = Problem.of(tokens, hidden, vocabulary, accelerator.device)
    exact = problem.exact().step(float64)
    several = tokens * vocabulary // 4

    def in_chunks(of: Problem) -> Scored:
        return chunked(of, chunk=several)

    return {
        name: errors(path, problem, exact) for name, path in (("chunked", in_chunks), ("fused", fused), ("full", full))
    }


def costs(accelerator: Accelerator, path: Path, *, tokens: int, hidden: int, vocabulary: int) -> dict[str, object]:
    """Peak bytes beyond the inputs, with both gradients, and median milliseconds; "why" where it has no room."""
    problem = Problem.of(tokens, hidden, vocabulary, accelerator.device)
    try:
        problem.step(path)
        problem.hidden_ND.grad = problem.weight_VD.grad = None
        peak = accelerator.peak_bytes(lambda: problem.step(path))
        seconds = [accelerator.seconds(lambda: problem.step(path)) for _ in range(5)]
    except torch.OutOfMemoryError as caught:
        return {"why": f"not measured: out of memory ({str(caught).splitlines()[0][:160]})"}
    return {"peak_bytes": peak, "ms": 1e3 * float(np.median(seconds)), "chunk_floats": chunk_of(accelerator.device)}
