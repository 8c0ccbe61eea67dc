"""Compiled blocks and logits against uncompiled ones; without a back end, which would need a C++ compiler."""

from functools import partial

import pytest
import torch

from millrace.core.errors import ModelError
from millrace.learner import flex, loading, logprobs
from millrace.learner.assemble import pack
from millrace.learner.attention import NAME, packed_attention
from millrace.learner.model import Inputs, load_model
from millrace.learner.model import logprobs as score
from tests.learner.test_attention import gradients, samples_of

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def front_end_alone(monkeypatch):
    limits = torch._dynamo.config.recompile_limit, torch._dynamo.config.fail_on_recompile_limit_hit
    monkeypatch.setattr(logprobs, "_fused", partial(torch.compile, backend="eager", dynamic=True, fullgraph=True))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    loading.AttentionInterface.register(NAME, packed_attention)
    torch._dynamo.config.recompile_limit, torch._dynamo.config.fail_on_recompile_limit_hit = limits
    torch._dynamo.reset()


def test_compiled_blocks_have_the_same_values_and_gradients_and_are_compiled_once(make_model, group_of):
    model = make_model("qwen3")
    shapes = [(5, (4, 7))], [(9, (20, 3)), (3, (2,))], [(2, (64, 31, 9))]
    rows = [Inputs.of(pack(samples_of(group_of, shape)), CPU) for shape in shapes]
    plain = [score(model, row)[0] for row in rows]
    expected = gradients(model, plain[1])
    loading.compile_blocks(model, backend="eager")
    compiled, graphs = [], []
    for row in rows:
        compiled.append(score(model, row, fused=True)[0])
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[-1] > 2, "other lengths and other blocks need no further compiling"
    for ours, theirs in zip(compiled, plain, strict=True):
        assert (ours - theirs).abs().max() < 1e-5
    compare(gradients(model, compiled[1]), expected)
    loading.checkpoint_blocks(model)
    compare(gradients(model, score(model, rows[1], fused=True)[0]), expected)


def compare(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for parameter, gradient in expected.items():
        assert (found[parameter] - gradient).abs().max() / max(1.0, float(gradient.abs().max())) < 1e-5, parameter


def test_the_attention_of_a_gpu_is_compiled_although_blocks_end_there(make_model, group_of, monkeypatch):
    """Uncompiled it would hold rows x rows."""
    seen = []

    def kernel(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return query * torch.linalg.vector_norm(key)

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        seen.append(len(graph.graph.nodes))
        return graph.forward

    compiled = torch.compile(kernel, backend=backend, dynamic=True, fullgraph=True)
    model = make_model("qwen3")
    loading.compile_blocks(model, backend="eager")
    monkeypatch.setattr(flex, "takes", lambda *parts, **kwargs: True)
    monkeypatch.setattr(flex, "attend", lambda mask, q, k, v, *, scale: compiled(q, k).transpose(1, 2))
    for answers in (7, 30):
        score(model, Inputs.of(pack(samples_of(group_of, [(5, (answers, 3))])), CPU))
    assert len(seen) == 1


def test_a_model_without_blocks_is_refused(table_dir):
    with pytest.raises(ModelError, match="no blocks that can be compiled; set compile to false"):
        loading.compile_blocks(load_model(table_dir, device=CPU), backend="eager")
