"""Chunked log-probabilities against plain log_softmax, in values, gradients and memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from millrace.learner import logprobs
from millrace.learner.logprobs import Head, logprobs_of_logits, token_logprobs

N, D, V = 37, 12, 23


def tensors(bias: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    torch.manual_seed(0)
    hidden_ND = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    weight_VD = torch.randn(V, D, dtype=torch.float64, requires_grad=True)
    bias_V = torch.randn(V, dtype=torch.float64, requires_grad=True) if bias else None
    return hidden_ND, weight_VD, bias_V, torch.randint(V, (N,))


def plain(hidden_ND, weight_VD, bias_V, token_N, scale, softcap, temperature):
    logits = hidden_ND @ weight_VD.T
    if bias_V is not None:
        logits = logits + bias_V
    logits = logits * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logprob_NV = torch.log_softmax(logits / temperature, 1)
    entropy_N = torch.distributions.Categorical(logits=logits / temperature).entropy()
    return logprob_NV[torch.arange(N), token_N], entropy_N


@pytest.mark.parametrize("chunk", [V, 5 * V, 1000 * V])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scale", "softcap", "temperature"), [(1.0, None, 1.0), (0.5, None, 0.7), (1.5, 2.0, 1.3)])
def test_values_and_gradients_are_those_of_log_softmax(chunk, bias, scale, softcap, temperature):
    weights = torch.linspace(-1, 2, N), torch.linspace(1, -1, N)
    outcomes = []
    for ours in (True, False):
        hidden_ND, weight_VD, bias_V, token_N = tensors(bias)
        if ours:
            head = Head(weight_VD=weight_VD, bias_V=bias_V, scale=scale, softcap=softcap)
            pair = token_logprobs(hidden_ND, head, token_N, temperature=temperature, chunk=chunk)
        else:
            pair = plain(hidden_ND, weight_VD, bias_V, token_N, scale, softcap, temperature)
        sum((x * w).sum() for x, w in zip(pair, weights, strict=True)).backward()
        outcomes.append([*pair, hidden_ND.grad, weight_VD.grad, *([bias_V.grad] if bias else [])])
    for ours, theirs in zip(*outcomes, strict=True):
        assert ours.dtype == torch.float32 or ours.dtype == theirs.dtype
        torch.testing.assert_close(ours.double(), theirs.double(), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("which", [0, 1])
def test_each_outcome_alone_has_its_gradient(which):
    hidden_ND, weight_VD, _, token_N = tensors(False)
    token_logprobs(hidden_ND, Head(weight_VD=weight_VD), token_N)[which].sum().backward()
    ours = hidden_ND.grad.clone()
    hidden_ND.grad = None
    plain(hidden_ND, weight_VD, None, token_N, 1.0, None, 1.0)[which].sum().backward()
    torch.testing.assert_close(ours, hidden_ND.grad, atol=2e-5, rtol=1e-5)


def test_a_frozen_head_gets_no_gradient():
    hidden_ND, weight_VD, _, token_N = tensors(False)
    head = Head(weight_VD=weight_VD.detach())
    token_logprobs(hidden_ND, head, token_N)[0].sum().backward()
    assert hidden_ND.grad is not None


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outcome = func(*args, **(kwargs or {}))
        for x in outcome if isinstance(outcome, tuple | list) else (outcome,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return outcome


def test_tokens_by_vocabulary_is_never_held_forward_or_backward():
    tokens, vocabulary, chunk = 512, 1000, 20_000
    hidden_ND = torch.randn(tokens, 8, requires_grad=True)
    head = Head(weight_VD=torch.randn(vocabulary, 8, requires_grad=True))
    token_N = torch.randint(vocabulary, (tokens,))

    def largest(limit: int) -> int:
        with Largest() as seen:
            logprob_N, entropy_N = token_logprobs(hidden_ND, head, token_N, chunk=limit)
            (logprob_N.sum() + entropy_N.sum()).backward()
        return seen.elements

    assert largest(chunk) == chunk
    assert largest(tokens * vocabulary) == tokens * vocabulary, "the meter sees full logits where they are made"


def test_bfloat16_products_under_autocast_stay_close():
    hidden_ND, weight_VD, _, token_N = tensors(False)
    hidden, weight = hidden_ND.detach().float().requires_grad_(), weight_VD.detach().float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logprob_N, _ = token_logprobs(hidden, Head(weight_VD=weight), token_N)
    logprob_N.sum().backward()
    exact_N, _ = plain(hidden_ND, weight_VD, None, token_N, 1.0, None, 1.0)
    assert logprob_N.dtype == weight.grad.dtype == torch.float32
    gap = (logprob_N - exact_N.float()).abs().max()
    assert 1e-6 < gap < 0.1


def test_logits_that_a_model_hands_out():
    logits_NV = torch.tensor([[0.0, 2.0]])
    logprob_N, entropy_N = logprobs_of_logits(logits_NV, torch.tensor([1]), temperature=2.0)
    p = 1 / (1 + torch.exp(torch.tensor(-1.0)))
    torch.testing.assert_close(logprob_N, torch.log(p)[None])
    torch.testing.assert_close(entropy_N, (-p * p.log() - (1 - p) * (1 - p).log())[None])


@pytest.mark.parametrize("asked", [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
@pytest.mark.parametrize(("scale", "softcap", "temperature"), [(1.0, None, 0.7), (1.5, 2.0, 1.3)])
def test_the_form_that_is_compiled_is_the_same(asked, scale, softcap, temperature, monkeypatch):
    monkeypatch.setattr(logprobs, "_fused", lambda function: function)
    gradients = []
    for fused in (True, False):
        hidden_ND, weight_VD, bias_V, token_N = tensors(True)
        head = Head(weight_VD=weight_VD, bias_V=bias_V, scale=scale, softcap=softcap)
        pair = token_logprobs(hidden_ND, head, token_N, temperature=temperature, chunk=5 * V, fused=fused)
        sum((x * share).sum() for x, share in zip(pair, asked, strict=True) if share).backward()
        gradients.append([hidden_ND.grad, weight_VD.grad, bias_V.grad])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


def test_a_gpus_chunk_follows_from_its_whole_memory(monkeypatch):
    memory = type("Properties", (), {"total_memory": 128 * 2**30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    assert logprobs.chunk_of(torch.device("cuda")) == 2**31 // 4
    assert logprobs.chunk_of(torch.device("cpu")) == logprobs.CHUNK
