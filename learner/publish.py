"""Versioned weights out: one flat buffer, reused, with a manifest that lets every receiver prove what it holds.

Where adapters are trained, they alone are published, in float32; receivers merge them with the base model's files.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from millrace.core.protocols import Adapter, Manifest, Probe
from millrace.core.types import Ints
from millrace.core.weights import buffer_bytes, digest_of, layout
from millrace.learner.config import PublishedDtype
from millrace.learner.model import Policy

# Largest |difference| in nats between a probe here and in an engine that holds the same weights, at least. Measured
# between vLLM and transformers: 1e-6 in float32, 8e-3 in bfloat16; a stale tensor is off by more than 1.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.05}
# How far half precision moves a probe grows with the logits and the depth. So it is measured, on the very weights, and
# allowed so many times: an engine rounds more often than our products in half precision do (up to 1.7 times as far).
ROUNDINGS = 4.0

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


class Publisher:
    """Packs the policy's parameters, or its adapters; the buffer is allocated once.

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
        self.tensors = layout((name, stored, tuple(tensor.shape)) for name, tensor in _named(policy))
        self._buffer = torch.zeros(buffer_bytes(self.tensors), dtype=torch.uint8, pin_memory=_pinned(policy.device))
        self._views = [
            self._buffer[t.offset : t.offset + t.size].view(getattr(torch, stored)).view(t.shape) for t in self.tensors
        ]
        self._probes = probe_sequences(policy.vocabulary, policy.context)

    def pack(self, *, version: int, step: int, epoch: int) -> tuple[Manifest, NDArray[np.uint8]]:
        """The manifest and the buffer of the weights as they are. The buffer is overwritten by the next call."""
        with torch.no_grad():
            for view, (_, tensor) in zip(self._views, _named(self._policy), strict=True):
                view.copy_(tensor, non_blocking=True)
        if self._policy.device.type == "cuda":
            torch.cuda.synchronize(self._policy.device)
        buffer = self._buffer.numpy()
        due = self._published % self._probe_every == 0
        self._published += 1
        probes = self._score(self._probes) if due else ()
        manifest = Manifest(
            version=version,
            step=step,
            epoch=epoch,
            tensors=self.tensors,
            digest=digest_of(buffer),
            probes=probes,
            tolerance=self._tolerance(probes),
            adapter=self._adapter,
        )
        return manifest, buffer

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


def _pinned(device: torch.device) -> bool:
    return device.type == "cuda"
