"""Log-probabilities and entropies of chosen tokens, without ever holding tokens x vocabulary.

    logprob = z[token] - logsumexp(z),   entropy = logsumexp(z) - sum(softmax(z) * z),   z = logits / temperature

Logits are made chunk by chunk from hidden states and the head's weight, forward and again backward. What fits
into one chunk is kept for the backward pass instead of being made twice. Whatever type matrix products are in, logits
are summed and kept in float32 on a GPU: bfloat16 rounds a logit of 20 by 0.06 nats.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.autograd.function import once_differentiable

# Floats of one chunk's logits; about four buffers of this size live at a time.
CHUNK = 8_388_608
# On a GPU, the share of its memory that one such buffer takes: 2.2 GiB of 139. Large enough that the head's weight is
# rarely read again. Of all its memory, not of what is free: the chunks decide the last bits of a step.
CHUNK_SHARE = 1 / 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """How a language model makes logits from hidden states: softcap(scale * (hidden @ weight.T + bias))."""

    weight_VD: torch.Tensor
    bias_V: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None  # c * tanh(logits / c), as in Gemma 2


def token_logprobs(
    hidden_ND: torch.Tensor,
    head: Head,
    token_N: torch.Tensor,
    *,
    temperature: float = 1.0,
    chunk: int | None = None,
    fused: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each token, and the entropy of what it was chosen from.

    Args:
        hidden_ND: hidden states that predict the tokens.
        head: of the model.
        token_N: the tokens.
        temperature: logits are divided by it.
        chunk: floats of logits that may exist at a time; None: what suits the device.
        fused: what is done to logits is compiled: fewer passes over them.
    Returns:
        logprob_N and entropy_N in nats, float32, both with gradients to the hidden states and the head.

    >>> head = Head(weight_VD=torch.tensor([[1.0], [0.0]]))
    >>> logprob, entropy = token_logprobs(torch.tensor([[0.0]]), head, torch.tensor([1]))
    >>> round(logprob.item(), 4), round(entropy.item(), 4)
    (-0.6931, 0.6931)
    """
    make = _Logits(head.scale, head.softcap, temperature, fused)
    logprob_N, entropy_N = _TokenLogprobs.apply(  # type: ignore[no-untyped-call]  # torch does not annotate it
        hidden_ND, head.weight_VD, head.bias_V, token_N, make, chunk or chunk_of(hidden_ND.device)
    )
    return logprob_N, entropy_N


def chunk_of(device: torch.device) -> int:
    """Floats of logits that may exist at a time there."""
    if device.type != "cuda":
        return CHUNK
    return int(torch.cuda.get_device_properties(device).total_memory * CHUNK_SHARE) // 4


def logprobs_of_logits(
    logits_NV: torch.Tensor, token_N: torch.Tensor, *, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for models that hand out logits: log-probability and entropy, nats, [N] each."""
    logprob_NV = torch.log_softmax(logits_NV.float() / temperature, -1)
    entropy_N = -(logprob_NV.exp() * logprob_NV).sum(-1)
    return logprob_NV.gather(1, token_N[:, None])[:, 0], entropy_N


def _compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    """Of matrix products here: autocast's where it is on."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def _spans(count: int, width: int, chunk: int) -> Iterator[slice]:
    step = max(1, chunk // width)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


@dataclass(frozen=True, slots=True)
class _Logits:
    """The logits of one chunk, and their derivative."""

    scale: float
    softcap: float | None
    temperature: float
    fused: bool

    def forward(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Logits over temperature, float32."""
        logits = _product(hidden, weight.T)
        if bias is not None:
            logits = logits.add_(bias)
        if self.softcap is None:
            factor = self.scale / self.temperature
            return logits if factor == 1.0 else logits.mul_(factor)
        return torch.tanh_(logits.mul_(self.scale / self.softcap)).mul_(self.softcap / self.temperature)

    def read(self, logits: torch.Tensor, token_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """normaliser_N, logprob_N and entropy_N."""
        found: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
        found = (_fused(_read) if self.fused else _read)(logits, token_N)
        return found

    def backward(
        self,
        logits: torch.Tensor,
        token_N: torch.Tensor,
        normaliser_N: torch.Tensor,
        entropy_N: torch.Tensor,
        logprob_grad_N: torch.Tensor | None,
        entropy_grad_N: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """The gradient of hidden @ weight.T."""
        factor = self.scale / self.temperature
        if factor != 1.0:  # linear in both, which are shorter than the logits
            logprob_grad_N, entropy_grad_N = (
                None if grad_N is None else grad_N * factor for grad_N in (logprob_grad_N, entropy_grad_N)
            )
        gradient = _fused(_gradient_in_one) if self.fused else _gradient
        wanted = torch.float32 if self.softcap is not None else dtype
        grad: torch.Tensor = gradient(logits, token_N, normaliser_N, entropy_N, logprob_grad_N, entropy_grad_N, wanted)
        if self.softcap is not None:
            grad.mul_(1 - (logits * (self.temperature / self.softcap)).square_())
        return grad.to(dtype)


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right in float32, summed in float32 where the device can."""
    if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).float()


def _read(logits: torch.Tensor, token_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """normaliser_N, logprob_N, entropy_N; one sum of exp(z) and one of exp(z) z."""
    largest_N = logits.amax(1)
    share = (logits - largest_N[:, None]).exp_()
    sum_N = share.sum(1)
    normaliser_N = sum_N.log() + largest_N
    logprob_N = logits.gather(1, token_N[:, None])[:, 0] - normaliser_N
    return normaliser_N, logprob_N, normaliser_N - share.mul_(logits).sum(1) / sum_N


def _gradient(
    logits: torch.Tensor,
    token_N: torch.Tensor,
    normaliser_N: torch.Tensor,
    entropy_N: torch.Tensor,
    logprob_grad_N: torch.Tensor | None,
    entropy_grad_N: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """d logprob / dz = onehot - p;  d entropy / dz = -p * (log p + entropy)."""
    log_p = logits - normaliser_N[:, None]
    if entropy_grad_N is None:
        assert logprob_grad_N is not None, "autograd asks for no gradient of nothing"
        grad = log_p.exp_().mul_(-logprob_grad_N[:, None])
    else:
        p = log_p.exp()
        grad = p.mul(-entropy_grad_N[:, None]).mul_(log_p.add_(entropy_N[:, None]))
        if logprob_grad_N is not None:
            grad.sub_(p.mul_(logprob_grad_N[:, None]))
    if logprob_grad_N is not None:
        grad.scatter_add_(1, token_N[:, None], logprob_grad_N[:, None].to(grad.dtype))
    return grad.to(dtype)


def _gradient_in_one(
    logits: torch.Tensor,
    token_N: torch.Tensor,
    normaliser_N: torch.Tensor,
    entropy_N: torch.Tensor,
    logprob_grad_N: torch.Tensor | None,
    entropy_grad_N: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The same element by element: compiled, it reads the logits once and writes once."""
    log_p = logits - normaliser_N[:, None]
    p = log_p.exp()
    grad = torch.zeros_like(p)
    if logprob_grad_N is not None:
        chosen = torch.arange(logits.shape[1], device=logits.device) == token_N[:, None]
        grad = (chosen.to(p.dtype) - p) * logprob_grad_N[:, None]
    if entropy_grad_N is not None:
        grad = grad - p * (log_p + entropy_N[:, None]) * entropy_grad_N[:, None]
    return grad.to(dtype)


@cache
def _fused(function: Callable[..., Any]) -> Any:
    """Compiled once for chunks of every length."""
    return torch.compile(function, dynamic=True, fullgraph=True)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        token_N: torch.Tensor,
        make: _Logits,
        chunk: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = _compute_dtype(hidden_ND)
        weight = weight_VD.to(dtype)
        bias = None if bias_V is None else bias_V.to(dtype)
        normaliser_N = torch.empty(len(token_N), device=hidden_ND.device)
        logprob_N, entropy_N = torch.empty_like(normaliser_N), torch.empty_like(normaliser_N)
        kept = None
        for part in _spans(len(token_N), len(weight_VD), chunk):
            logits = make.forward(hidden_ND[part].to(dtype), weight, bias)
            kept = logits
            normaliser_N[part], logprob_N[part], entropy_N[part] = make.read(logits, token_N[part])
        whole = kept if kept is not None and len(kept) == len(token_N) else None
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, token_N, normaliser_N, entropy_N, whole)
        ctx.make, ctx.dtype, ctx.chunk = make, dtype, chunk
        ctx.set_materialize_grads(False)
        return logprob_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, logprob_grad_N: torch.Tensor | None, entropy_grad_N: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        if logprob_grad_N is None and entropy_grad_N is None:
            return (None,) * 6
        hidden_ND, weight_VD, bias_V, token_N, normaliser_N, entropy_N, whole = ctx.saved_tensors
        weight = weight_VD.to(ctx.dtype)
        bias = None if bias_V is None else bias_V.to(ctx.dtype)
        hidden_grad = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        weight_grad = torch.zeros_like(weight_VD, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        bias_grad = torch.zeros_like(bias_V, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        for part in _spans(len(token_N), len(weight_VD), ctx.chunk):
            hidden = hidden_ND[part].to(ctx.dtype)
            logits = ctx.make.forward(hidden, weight, bias) if whole is None else whole
            grad = ctx.make.backward(
                logits,
                token_N[part],
                normaliser_N[part],
                entropy_N[part],
                None if logprob_grad_N is None else logprob_grad_N[part],
                None if entropy_grad_N is None else entropy_grad_N[part],
                ctx.dtype,
            )
            if hidden_grad is not None:
                hidden_grad[part] = (grad @ weight).to(hidden_grad.dtype)
            if weight_grad is not None:
                _add_product(weight_grad, grad.T, hidden)
            if bias_grad is not None:
                bias_grad += grad.sum(0)
        return (
            hidden_grad,
            None if weight_grad is None else weight_grad.to(weight_VD.dtype),
            None if bias_grad is None else bias_grad.to(bias_V.dtype),
            *[None] * 3,
        )


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total += left @ right, without a second array of the head's size where the types allow it."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += _product(left, right)
