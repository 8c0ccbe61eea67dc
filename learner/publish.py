"""Versioned weights out: one flat buffer, poured in parts, and a manifest that lets receivers prove what they hold.

Where adapters are trained, they alone are published, in float32; receivers merge them with the base model's files.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from millrace.core.protocols import Adapter, Manifest, Probe
from millrace.core.types import Ints
from millrace.core.weights import ALIGNMENT_BYTES, buffer_bytes, gathered, layout
from millrace.learner.config import PublishedDtype
from millrace.learner.model import Policy

# Largest |difference| in nats between a probe here and in an engine that holds the same weights, at least. Measured
# between vLLM and transformers: 1e-6 in float32, 8e-3 in bfloat16; a stale tensor is off by more than 1.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.05}
# How far half precision moves a probe grows with the logits and the depth. So it is measured, on the very weights, and
# allowed so many times: an engine rounds more often than our products in half precision do (up to 1.7 times as far).
ROUNDINGS = 4.0

PART_BYTES = 1 << 20  # a multiple of 64
CUDA_PART_BYTES = 64 << 20  # a copy from a GPU is waited for

PROBES = 4
PROBE_TOKENS = 24


def probe_sequences(vocabulary: int, context: int | None) -> list[Ints]:
    """Fixed sequences of random tokens, so that nearly every row of the embedding is read by some run.

    >>> [len(tokens) for tokens in probe_sequences(10, None)]
    [24, 24, 24, 24]
    """
    rng = np.random.default_rng(20_240_229)
    length = min(PROBE_TOKENS, context or PROBE_TOKENS)
    return [rng.integers(vocabulary, size=length, dtype=np.int32) for _ in range(PROBES)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """Implements `core.protocols.Packing` on the tensors that are trained, without a copy of them all."""

    size: int
    parts: Callable[[], Iterator[memoryview]]
    manifest: Callable[[str], Manifest]

    def pour(self, write: Callable[[memoryview], object]) -> None:
        for part in self.parts():
            write(part)


@dataclass(slots=True)
class _Together:
    """Tensors that are one part of the flat buffer, or one that is several."""

    sources: list[torch.Tensor] = field(default_factory=list)
    places: list[torch.Tensor] = field(default_factory=list)  # in the room; none for a tensor that is larger
    padding: list[tuple[int, int]] = field(default_factory=list)  # from byte to byte
    size: int = 0


class Publisher:
    """Packs the policy's parameters, or its adapters, part by part.

    Args:
        policy: whose model is published.
        dtype: of the weights in the engines, which compute in it.
        probe_every: the first version carries probes, and then each so-many-th.
    """

    def __init__(self, policy: Policy, *, dtype: PublishedDtype = "float32", probe_every: int = 20) -> None:
        self._policy = policy
        self._dtype: PublishedDtype = dtype
        self._probe_every = probe_every
        self._published = 0
        adapters = policy.adapters
        self._adapter = Adapter(base=adapters.base, scale=adapters.scale, dtype=dtype) if adapters else None
        stored = "float32" if adapters else dtype
        self._stored: torch.dtype = getattr(torch, stored)
        self.tensors = layout((name, stored, tuple(tensor.shape)) for name, tensor in _named(policy))
        self._sources = [tensor for _, tensor in _named(policy)]  # for good: they are trained in place
        cuda = policy.device.type == "cuda"
        # For what does not lie in memory as it is stored, and for what is small.
        self._room = torch.empty(CUDA_PART_BYTES if cuda else PART_BYTES, dtype=torch.uint8, pin_memory=cuda)
        self._flat = self._together()
        self._probes = probe_sequences(policy.vocabulary, policy.context)

    def packed(self, *, version: int, step: int, epoch: int) -> Packed:
        """The weights as they are, to be poured before they change."""
        due = self._published % self._probe_every == 0
        self._published += 1
        probes = self._score(self._probes) if due else ()
        manifest = partial(
            Manifest,
            version=version,
            step=step,
            epoch=epoch,
            tensors=self.tensors,
            probes=probes,
            tolerance=self._tolerance(probes),
            adapter=self._adapter,
        )
        size = buffer_bytes(self.tensors)
        return Packed(size=size, parts=self._parts, manifest=lambda digest: manifest(digest=digest))

    def pack(self, *, version: int, step: int, epoch: int) -> tuple[Manifest, NDArray[np.uint8]]:
        """The manifest, and all bytes in memory."""
        return gathered(self.packed(version=version, step=step, epoch=epoch))

    def _together(self) -> list[_Together]:
        """Neighbours that fit into the room go in one part; what does not fit goes alone."""
        found: list[_Together] = []
        for source, placed in zip(self._sources, self.tensors, strict=True):
            padded = -(-placed.size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
            if not found or found[-1].size + padded > len(self._room):
                found.append(_Together())
            last = found[-1]
            if padded <= len(self._room):
                last.places.append(self._room[last.size : last.size + placed.size].view(self._stored))
            last.sources.append(source)
            last.size += padded
            if padded > placed.size:
                last.padding.append((last.size - padded + placed.size, last.size))
        return found

    def _parts(self) -> Iterator[memoryview]:
        """The flat buffer. A part is overwritten when the next one is asked for."""
        for together in self._flat:
            flat = [source.detach().reshape(-1) for source in together.sources]
            if together.places:
                torch._foreach_copy_(together.places, flat)
                for first, end in together.padding:
                    self._room[first:end] = 0
                yield self._bytes(together.size)
                continue
            for part in flat[0].split(len(self._room) // self._stored.itemsize):
                yield self._there(part)
            for first, end in together.padding:
                yield memoryview(bytes(end - first))

    def _there(self, part: torch.Tensor) -> memoryview:
        """As it is stored, in this machine's memory."""
        if part.device.type == "cpu" and part.dtype == self._stored:
            return part.view(torch.uint8).numpy().data
        size = part.numel() * self._stored.itemsize
        self._room[:size].view(self._stored).copy_(part)
        return self._bytes(size)

    def _bytes(self, size: int) -> memoryview:
        return self._room[:size].numpy().data

    def _tolerance(self, probes: Sequence[Probe]) -> float:
        least = TOLERANCE[self._dtype]
        if self._dtype == "float32":
            return least
        if not probes:
            return least
        reduced = self._policy.score_all([probe.tokens_T for probe in probes], dtype=getattr(torch, self._dtype))
        gaps = [float(np.abs(low - probe.logprob_T).max()) for low, probe in zip(reduced, probes, strict=True)]
        return max([least, *(ROUNDINGS * gap for gap in gaps)])

    def _score(self, sequences: Sequence[Ints]) -> tuple[Probe, ...]:
        scored = zip(sequences, self._policy.score_all(sequences), strict=True)
        return tuple(Probe(tokens_T=tokens, logprob_T=logprob_T) for tokens, logprob_T in scored)


def _named(policy: Policy) -> Iterator[tuple[str, torch.Tensor]]:
    """What is trained: adapters, or parameters as `named_parameters` lists them, ties once."""
    return policy.adapters.factors() if policy.adapters else policy.model.named_parameters()
