"""The base model that adapters are merged with, and the memory that holds the outcome. See adapters.py."""

import mmap
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from millrace.actors.engines.wiring import load_reference
from millrace.core.errors import WeightsError
from millrace.core.protocols import Adapter, Manifest, Tensor
from millrace.core.weights import buffer_bytes, factors_of, identity_of, layout, view_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The base model: its identity, the layout of whole weights, and the weights that adapters change."""

    identity: str
    tensors: tuple[Tensor, ...]
    whole: NDArray[np.uint8]  # all weights, as engines compute in; copied into the buffers, then let go
    adapted: Mapping[str, torch.Tensor]  # float32, or bfloat16 where that holds the same values

    @staticmethod
    def of(model: str, manifest: Manifest, adapter: Adapter) -> "Base":
        """Read from the model's files. Raises WeightsError when the adapter does not fit them."""
        named = dict(load_reference(model, "float32").named_parameters())
        adapted = factors_of(manifest.tensors).keys()
        if odd := sorted(adapted - named.keys()):
            raise WeightsError(
                f"version {manifest.version} has an adapter of {odd[0]}, which {model} has not: learner and engine "
                "hold different models"
            )
        tensors = layout((name, adapter.dtype, tuple(weight.shape)) for name, weight in named.items())
        whole = np.zeros(buffer_bytes(tensors), np.uint8)
        for tensor in tensors:
            _tensor(whole, tensor).copy_(named[tensor.name])
        return Base(
            identity=identity_of((name, weight.numpy()) for name, weight in named.items()),
            tensors=tensors,
            whole=whole,
            adapted={name: _compact(named[name].detach()) for name in adapted},
        )

    @torch.inference_mode()
    def merge(self, manifest: Manifest, factors: NDArray[np.uint8], whole: NDArray[np.uint8], *, scale: float) -> None:
        """Write the weights that have adapters into `whole`."""
        places = {tensor.name: tensor for tensor in self.tensors}
        pairs = factors_of(manifest.tensors)
        if odd := sorted(pairs.keys() ^ self.adapted.keys()):
            raise WeightsError(
                f"version {manifest.version}: earlier versions had other adapters, such as of {odd[0]}: start the "
                "worker again"
            )
        for name, pair in pairs.items():
            b, a = (torch.from_numpy(np.array(view_of(factors, tensor))) for tensor in pair)
            if (len(b), a.shape[1]) != tuple(places[name].shape):
                raise WeightsError(
                    f"version {manifest.version}: the adapter of {name} makes {[len(b), a.shape[1]]}, the weight is "
                    f"{list(places[name].shape)}: learner and engine hold different models"
                )
            _tensor(whole, places[name]).copy_(torch.addmm(self.adapted[name].float(), b, a, alpha=scale))


def _tensor(buffer: NDArray[np.uint8], tensor: Tensor) -> torch.Tensor:
    flat = torch.from_numpy(buffer[tensor.offset : tensor.offset + tensor.size])
    return flat.view(getattr(torch, tensor.dtype)).view(tensor.shape)


def _compact(weight: torch.Tensor) -> torch.Tensor:
    half = weight.to(torch.bfloat16)
    return half if torch.equal(half.float(), weight) else weight


class Buffer:
    """Bytes that engine processes of this machine open by a path, and that end with this process."""

    def __init__(self, content: NDArray[np.uint8]) -> None:
        if hasattr(os, "memfd_create"):
            self._file = os.fdopen(os.memfd_create("millrace-weights"), "r+b")
            self.path = f"/proc/{os.getpid()}/fd/{self._file.fileno()}"
        else:  # macOS: a killed process leaves the file to the system's cleaning of temporary files
            self._file = tempfile.NamedTemporaryFile(prefix="millrace-weights-")  # type: ignore[assignment]  # noqa: SIM115
            self.path = self._file.name
        self._file.truncate(len(content))
        self.bytes: NDArray[np.uint8] = np.frombuffer(mmap.mmap(self._file.fileno(), len(content)), np.uint8)
        self.bytes[:] = content
