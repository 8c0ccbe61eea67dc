"""What runs inside every vLLM worker process: loading published weights, and noise by (seed, position).

vLLM imports this module by name (`worker_extension_cls`) before it builds the model, also in child processes.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from vllm.model_executor.layers import utils as layer_utils
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

from millrace.actors.engines import vllm_kernels  # noqa: F401  # registers its operations in this process
from millrace.actors.engines.sampling import noise, streams
from millrace.core.errors import WeightsError
from millrace.core.weights import map_file

TensorRow = tuple[str, str, tuple[int, ...], int, int]  # name, dtype, shape, offset, size

_pack = layer_utils.dispatch_cpu_unquantized_gemm


def _pack_and_keep(layer: torch.nn.Module, remove_weight: bool) -> None:
    # The CPU build computes with a packed copy of each linear weight and frees the original, which weights that
    # arrive later are loaded into. So the originals stay.
    _pack(layer, remove_weight=False)


layer_utils.dispatch_cpu_unquantized_gemm = _pack_and_keep


class WorkerExtension:
    """Methods that vLLM mixes into its worker; called through `collective_rpc`."""

    model_runner: Any

    def load_buffer(self, path: str, rows: list[TensorRow]) -> tuple[list[str], list[str]]:
        """Load parameters from a flat buffer. Returns (names consumed, the model's parameters that were not set).

        Raises:
            WeightsError: vLLM's model refuses a tensor; named, with its shape.
        """
        # Copy-on-write, so that torch gets writable pages without ever copying them.
        buffer = torch.from_numpy(map_file(path, mode="c"))
        consumed: list[str] = []

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            for name, dtype, shape, offset, size in rows:
                consumed.append(name)
                yield name, buffer[offset : offset + size].view(getattr(torch, dtype)).view(shape)

        model = self.model_runner.get_model()
        try:
            loaded = model.load_weights(tensors())
        except (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, ValueError) as caught:
            shape = {row[0]: row[2] for row in rows}.get(consumed[-1]) if consumed else None
            raise WeightsError(
                f"vLLM refuses tensor {consumed[-1] if consumed else '(none)'} of shape {shape} "
                f"({type(caught).__name__}: {caught}): learner and engine hold different models"
            ) from caught
        self.repack(model)
        unset = [] if loaded is None else sorted({name for name, _ in model.named_parameters()} - set(loaded))
        return consumed, unset

    def repack(self, model: torch.nn.Module) -> None:
        """Pack the linear weights of the CPU build again, a tied lm_head among them."""
        for module in model.modules():
            if hasattr(module, "cpu_linear"):
                _pack(module, remove_weight=False)

    def draw_by_position(self) -> bool:
        """Take the noise of a token from its sequence's seed and position. False where vLLM does so itself."""
        sampler = getattr(self.model_runner, "sampler", None)
        if self.model_runner.device.type != "cpu" or sampler is None:
            return False
        sampler.topk_topp_sampler.forward = _PositionSampler(self.model_runner)
        return True


class _PositionSampler:
    """Gumbel-max sampling with vLLM's CPU kernel, whose noise is a function of one 64-bit number per row.

    vLLM draws that number from one torch generator per request, in a Python loop over the rows. Here it is a hash
    of the seed, which is the last part of the request's id, and of the tokens that precede: one vector operation.
    """

    def __init__(self, model_runner: Any) -> None:
        self._batch: Callable[[], Any] = lambda: model_runner.input_batch
        self._ids: list[str] = []
        self._stream_R = np.zeros(0, np.uint64)

    def __call__(
        self,
        logits: torch.Tensor,
        generators: dict[int, torch.Generator],
        k: torch.Tensor | None,
        p: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        batch = self._batch()
        logits = apply_top_k_top_p(logits, k, p)
        logprob = logits.log_softmax(dim=-1, dtype=torch.float32)
        ids = batch.req_ids[: len(logits)]
        if ids != self._ids:
            self._ids = list(ids)
            self._stream_R = streams([seed_of_request(name) for name in ids])
        bits_R = noise(self._stream_R, batch.num_tokens_no_spec[: len(logits)].astype(np.int64))
        seeds = torch.from_numpy((bits_R >> np.uint64(1)).astype(np.int64))
        return torch.ops._C.fused_gumbel_argmax(logits.to(torch.float32), seeds), logprob


def request_id(number: int, seed: int) -> str:
    """The id of a request that carries its seed."""
    return f"{number}.{seed}"


def seed_of_request(name: str) -> int:
    """The seed in a request's id; 0 for vLLM's own requests.

    >>> seed_of_request(request_id(3, 17))
    17
    """
    seed = name.split("-")[0].rpartition(".")[2]
    return int(seed) if seed.isdecimal() else 0
