"""Does an engine really compute with what is loaded into it? Perturb every tensor, load, and compare.

A digest proves which bytes arrived, not which bytes the engine multiplies with: engines repack weights, fuse
parameters and tie embeddings, and a stale copy is silent.
"""

import asyncio
import tempfile
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, PreTrainedModel

from millrace.core.errors import ModelError, WeightsError, boundary
from millrace.core.one_at_a_time import MODEL_LOADING
from millrace.core.protocols import Engine, Manifest, Probe, WeightHandle
from millrace.core.types import Floats, Ints
from millrace.core.weights import buffer_bytes, digest_of, layout, write

TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.05}  # nats; measured gaps are 10 to 100 times smaller
BEFORE_ALL = -1  # the version an engine has before its first load


async def check_wiring(
    engine: Engine, model: str, *, dtype: str = "float32", tolerance: float | None = None, seed: int = 0
) -> float:
    """Load a version in which every tensor is perturbed, compare probes, and load the model's own weights again.

    Call it at engine start, before the first published version: the engine is at version -1 before and after.

    Args:
        engine: under test.
        model: directory of the checkpoint that the engine was built from.
        dtype: what the engine computes in.
        tolerance: nats; None: the dtype's.
        seed: of the perturbation.

    Returns:
        The largest |difference| of a probe's log-probability between engine and transformers, nats.

    Raises:
        WeightsError: the engine does not compute with the loaded weights, or the perturbation would not show.
    """
    if engine.version > BEFORE_ALL:
        raise WeightsError(f"check_wiring: the engine is at version {engine.version}: run it before the first load")
    allowed = TOLERANCE[dtype] if tolerance is None else tolerance
    with tempfile.TemporaryDirectory(prefix="millrace-wiring-") as directory:
        # In a thread: loading the reference takes as long as the engine's start, and its worker answers meanwhile.
        own, other, shift = await asyncio.to_thread(_versions, model, directory, dtype, allowed, seed)
        if not shift > 10 * allowed:
            raise WeightsError(
                f"check_wiring: perturbing every tensor of {model} moves the probes by {shift:.1e} nats only, "
                f"tolerance {allowed:.0e}: nothing would be proved; give a smaller tolerance"
            )
        proof = await engine.load(other, prove=True)
        restored = await engine.load(own, prove=True)
    return max(proof.probe_gap or 0.0, restored.probe_gap or 0.0)


def _versions(
    model: str, directory: str, dtype: str, tolerance: float, seed: int
) -> tuple[WeightHandle, WeightHandle, float]:
    """The model's own weights, perturbed ones, and how far these move the probes, nats."""
    reference = load_reference(model, dtype)
    sequences = probe_sequences(reference)
    own, buffer = manifest_of(reference, sequences, version=BEFORE_ALL, dtype=dtype, tolerance=tolerance)
    own_handle = write(directory, own, buffer)
    perturb(reference, seed)
    other, buffer = manifest_of(reference, sequences, version=BEFORE_ALL - 1, dtype=dtype, tolerance=tolerance)
    shift = max(float(np.abs(a.logprob_T - b.logprob_T).max()) for a, b in zip(own.probes, other.probes, strict=True))
    return own_handle, write(directory, other, buffer), shift


def load_reference(model: str, dtype: str) -> PreTrainedModel:
    """The checkpoint in transformers, on the CPU.

    Raises:
        ModelError: the directory holds no causal language model.
    """
    with boundary(f"transformers: opening {model}", ModelError), MODEL_LOADING:
        loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            model, dtype=getattr(torch, dtype), local_files_only=True
        )
        return loaded.eval().requires_grad_(False)


def perturb(model: PreTrainedModel, seed: int) -> None:
    """Change every parameter: by 30 % of each value and by noise of 2 % of one."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in model.named_parameters():
        relative = 1 + 0.3 * torch.randn(parameter.shape, generator=generator)
        parameter.mul_(relative.to(parameter.dtype))
        parameter.add_((0.02 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype))


def probe_sequences(model: PreTrainedModel, *, count: int = 4, length: int = 24) -> list[Ints]:
    """Fixed random sequences that fit the model's context."""
    config = model.config.get_text_config()
    rng = np.random.default_rng(0)
    length = min(length, (getattr(config, "max_position_embeddings", None) or length) - 1)
    return [rng.integers(config.vocab_size, size=length, dtype=np.int32) for _ in range(count)]


@torch.inference_mode()
def score(model: PreTrainedModel, tokens_T: Ints) -> Floats:
    """Log-probabilities of tokens_T[1:] by transformers, nats."""
    input_ids = torch.from_numpy(tokens_T.astype(np.int64))[None]
    logprob_TV = torch.log_softmax(model(input_ids=input_ids, use_cache=False).logits[0, :-1].float(), dim=-1)
    scored: Floats = logprob_TV.gather(1, input_ids[0, 1:, None])[:, 0].numpy()
    return scored


def manifest_of(
    model: PreTrainedModel, sequences: Sequence[Ints], *, version: int, dtype: str, tolerance: float
) -> tuple[Manifest, NDArray[np.uint8]]:
    """The model's parameters as a version ready to be written, with `sequences` as probes."""
    named = list(model.named_parameters())
    tensors = layout((name, dtype, tuple(parameter.shape)) for name, parameter in named)
    buffer = torch.zeros(buffer_bytes(tensors), dtype=torch.uint8)
    for tensor, (_, parameter) in zip(tensors, named, strict=True):
        flat = buffer[tensor.offset : tensor.offset + tensor.size]
        flat.view(getattr(torch, dtype)).view(tensor.shape).copy_(parameter.detach())
    flat_bytes = buffer.numpy()
    manifest = Manifest(
        version=version,
        step=0,
        epoch=0,
        tensors=tensors,
        digest=digest_of(flat_bytes),
        probes=tuple(Probe(tokens_T=tokens, logprob_T=score(model, tokens)) for tokens in sequences),
        tolerance=tolerance,
    )
    return manifest, flat_bytes
