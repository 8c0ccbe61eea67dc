"""Norms of vLLM's CPU build: as vLLM's own, and only where they can be."""

from typing import Any

import pytest
import torch

pytestmark = pytest.mark.ray  # to import vLLM takes seconds

EPSILON = 1e-5


@pytest.fixture(scope="module")
def norms() -> dict[str, tuple[Any, Any]]:
    """By operation, ours and vLLM's own."""
    kernels = pytest.importorskip("millrace.actors.engines.vllm_kernels")
    every = {name: getattr(pytest.importorskip("vllm.ir").ops, name).impls for name in kernels.OPS}
    if not all(each[kernels.PROVIDER].supported for each in every.values()):
        pytest.skip("vLLM was not built for a CPU")
    return {name: (each[kernels.PROVIDER], each["native"]) for name, each in every.items()}


def drawn(*shape: int) -> torch.Tensor:
    """Small enough that epsilon is seen."""
    return 0.01 * torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("width", [24, 64, 1000])
def test_a_norm_is_that_of_vllm(norms: Any, width: int) -> None:
    ours, native = norms["rms_norm"]
    x, weight = drawn(37, width), drawn(width)
    found = ours.impl_fn(x, weight, EPSILON)
    torch.testing.assert_close(found, native.impl_fn(x, weight, EPSILON), atol=1e-7, rtol=1e-5)
    assert torch.equal(x, drawn(37, width))


@pytest.mark.parametrize("width", [24, 64, 1000])
def test_a_norm_of_a_sum_is_that_of_vllm_in_place(norms: Any, width: int) -> None:
    ours, native = norms["fused_add_rms_norm"]
    x, residual, weight = drawn(37, width), drawn(37, width).flip(0).contiguous(), drawn(width)
    expected = native.impl_fn(x.clone(), residual.clone(), weight, EPSILON)
    found = ours.impl_fn(x, residual, weight, EPSILON)
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-5)
    assert found[0] is x and found[1] is residual


def test_what_it_cannot_do_it_does_not_take(norms: Any) -> None:
    one, two = norms["rms_norm"][0].supports_args, norms["fused_add_rms_norm"][0].supports_args
    x, weight = drawn(4, 32), drawn(32)
    assert one(x, weight, EPSILON)
    assert not one(x.view(4, 2, 16), weight[:16], EPSILON)  # heads
    assert not one(x[:, :16], weight[:16], EPSILON)  # a part of each row
    assert not one(x, weight, EPSILON, 16)
    assert not one(x, None, EPSILON)
    assert not one(x, weight.to(torch.bfloat16), EPSILON)
    assert two(x, x.clone(), weight, EPSILON)
    assert not two(x, drawn(4, 64)[:, :32], weight, EPSILON)
