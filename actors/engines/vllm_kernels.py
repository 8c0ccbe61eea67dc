"""Root-mean-square norms of vLLM's CPU build as one operation each: vLLM composes them of seven on a CPU."""

import torch
from torch import Tensor
from vllm import ir
from vllm.platforms import current_platform

current_platform.import_kernels()

PROVIDER = "millrace_cpu"
OPS = ("rms_norm", "fused_add_rms_norm")

_THERE = current_platform.is_cpu() and all(hasattr(torch.ops._C, name) for name in OPS)


def priority() -> dict[str, list[str]]:
    """The engine argument `ir_op_priority`; what the operations here do not take goes to vLLM's own."""
    return {name: [PROVIDER] for name in OPS}


def _takes(x: Tensor, weight: Tensor | None, variance_size: int | None) -> bool:
    whole = variance_size is None and x.dim() == 2 and x.is_contiguous()
    return whole and weight is not None and weight.dtype == x.dtype


def _takes_one(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
    return _takes(x, weight, variance_size)


def _takes_two(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    return _takes(x, weight, variance_size) and x_residual.is_contiguous() and x_residual.dtype == x.dtype


@ir.ops.rms_norm.register_impl(PROVIDER, supports_args=_takes_one, supported=_THERE)  # type: ignore[untyped-decorator]
def rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    """As vLLM's own, in one pass."""
    normed = torch.empty_like(x)
    torch.ops._C.rms_norm(normed, x, weight, epsilon)
    return normed


@ir.ops.fused_add_rms_norm.register_impl(PROVIDER, supports_args=_takes_two, supported=_THERE, inplace=True)  # type: ignore[untyped-decorator]
def fused_add_rms_norm(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """As vLLM's own, in one pass over both, which are overwritten."""
    torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
    return x, x_residual
