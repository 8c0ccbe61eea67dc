"""Packed attention on the GPU against float64, values and gradients, and its share of the measured peak."""

from types import SimpleNamespace

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.accelerator import Accelerator
from benchmarks.gpu.work import answers
from millrace.learner import flex
from millrace.learner.attention import KEYWORD, Plan, Spans, packed_attention

MODULE = SimpleNamespace(config=SimpleNamespace(model_type="benchmark"))


def spans_of(lengths: list[tuple[int, list[int]]]) -> Spans:
    """Of groups one behind the other; an answer's last token takes no row."""
    prompts, responses, at = [], [], 0
    for index, (prompt, members) in enumerate(lengths):
        prompts.append((at, prompt))
        at += prompt
        for length in members:
            responses.append((index, at, length - 1))
            at += length - 1
    prompt_KX, response_SX = np.array(prompts), np.array(responses)
    return Spans(
        prompt_start_K=prompt_KX[:, 0],
        prompt_length_K=prompt_KX[:, 1],
        prompt_S=response_SX[:, 0],
        start_S=response_SX[:, 1],
        length_S=response_SX[:, 2],
    )


def row_of(kind: str, rows: int, device: torch.device) -> Plan:
    """The plan of a packed row."""
    return Plan.of(spans_of(answers(kind, rows, np.random.default_rng(0)))).to(device)


def heads(plan: Plan, query: int, key: int, width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Random queries, keys and values, in values that bfloat16 holds."""
    device = plan.device
    made = torch.Generator(device).manual_seed(0)
    shapes = [(1, many, plan.cells, width) for many in (query, key, key)]
    drawn = (torch.randn(shape, device=device, generator=made).bfloat16().to(dtype) for shape in shapes)
    return [x.requires_grad_() for x in drawn]


def ours(plan: Plan, parts: list[torch.Tensor]) -> torch.Tensor:
    """As a layer calls it, [1, C, heads, width]."""
    return packed_attention(MODULE, *parts, None, **{KEYWORD: plan})[0]  # type: ignore[arg-type]  # no module is needed


def exact(plan: Plan, parts: list[torch.Tensor]) -> torch.Tensor:
    """Row by row from the rule, with rows x rows."""
    index = torch.arange(plan.cells, device=plan.device)
    zero = torch.zeros((), dtype=torch.long, device=index.device)
    seen = flex.block_mask(plan.runs, None, index.device).mask_mod(zero, zero, index[:, None], index[None])
    return scaled_dot_product_attention(*parts, attn_mask=seen, enable_gqa=True).transpose(1, 2)


def _outcomes(call: object, plan: Plan, parts: list[torch.Tensor]) -> list[torch.Tensor]:
    outcome = call(plan, parts)  # type: ignore[operator]  # ours or exact
    (outcome * torch.linspace(-1, 1, plan.cells, device=outcome.device)[None, :, None, None]).sum().backward()
    return [outcome.detach(), *(x.grad for x in parts if x.grad is not None)]


def correctness(plan: Plan, *, query: int, key: int, width: int, dtype: torch.dtype) -> dict[str, float]:
    """Outcome and gradients against float64, relative to the exact one's norm."""
    found = _outcomes(ours, plan, heads(plan, query, key, width, dtype))
    expected = _outcomes(exact, plan, heads(plan, query, key, width, torch.float64))
    names = ("outcome", "query_gradient", "key_gradient", "value_gradient")
    return {name: float((x.double() - y).norm() / y.norm()) for name, x, y in zip(names, found, expected, strict=True)}


def speed(accelerator: Accelerator, plan: Plan, *, query: int, key: int, width: int) -> dict[str, float]:
    """Of one layer in bfloat16, forward and backward: milliseconds, and operations per second on seen pairs."""
    parts = heads(plan, query, key, width, torch.bfloat16)
    grad = torch.randn(1, plan.cells, query, width, device=accelerator.device, dtype=torch.bfloat16)

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return ours(plan, parts)

    def both() -> None:
        ours(plan, parts).backward(grad)

    found = {}
    for name, call, products in (("forward", forward, 4), ("forward_and_backward", both, 12)):
        for _ in range(2):
            call()
        seconds = float(np.median([accelerator.seconds(call) for _ in range(5)]))
        found[f"{name}_ms"] = 1e3 * seconds
        found[f"{name}_operations_per_s"] = products * plan.runs.pairs * query * width / seconds
    return found
