"""Published weights on disk: one flat buffer and one JSON manifest per version, and the store that keeps them.

A version is complete exactly when its manifest is there: the buffer is written and renamed first. What a reader has
mapped stays as it is, even after the version was deleted, see core/weight_files.py.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import xxhash
from numpy.typing import NDArray

from millrace.core.errors import WeightsError
from millrace.core.protocols import Adapter, Manifest, Packing, Probe, Tensor, WeightHandle
from millrace.core.weight_files import VersionGoneError, fill, filling, map_file

__all__ = [
    "VersionGoneError",
    "buffer_bytes",
    "digest_of",
    "factors_of",
    "from_json",
    "gathered",
    "identity_of",
    "layout",
    "map_file",
    "mapped",
    "place",
    "poured",
    "temporary_of",
    "to_json",
    "view_of",
    "views",
    "write",
]

ALIGNMENT_BYTES = 64  # a cache line, and the widest vector load
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_NUMPY_DTYPE: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(np.uint16),
    "float16": np.dtype(np.float16),
}


def layout(named: Iterable[tuple[str, str, tuple[int, ...]]]) -> tuple[Tensor, ...]:
    """Offsets of (name, dtype, shape) triples in one flat buffer, each aligned to 64 bytes.

    Raises:
        WeightsError: a dtype that cannot be published, or a name twice.

    >>> [tensor.offset for tensor in layout([("a", "float32", (3,)), ("b", "bfloat16", (2, 2))])]
    [0, 64]
    """
    tensors: list[Tensor] = []
    offset = 0
    seen: set[str] = set()
    for name, dtype, shape in named:
        if dtype not in ITEM_BYTES:
            raise WeightsError(
                f"parameter {name} has dtype {dtype}: publish one of {', '.join(ITEM_BYTES)}; cast it before"
            )
        if name in seen:
            raise WeightsError(f"parameter {name} appears twice: give tied parameters once")
        seen.add(name)
        size = math.prod(shape) * ITEM_BYTES[dtype]
        tensors.append(Tensor(name=name, dtype=dtype, shape=tuple(shape), offset=offset, size=size))
        offset += -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return tuple(tensors)


def buffer_bytes(tensors: Iterable[Tensor]) -> int:
    """Size of the flat buffer that holds `tensors`, bytes.

    >>> buffer_bytes(layout([("a", "float32", (3,)), ("b", "bfloat16", (2, 2))]))
    128
    """
    return max((-(-(t.offset + t.size) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES for t in tensors), default=0)


def digest_of(buffer: NDArray[np.uint8]) -> str:
    """XXH3 of the bytes, 128 bits, hexadecimal: it finds damage, at the speed of memory. Releases the GIL.

    >>> digest_of(np.zeros(0, np.uint8))[:8]
    '99aa06d3'
    """
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(buffer).data)


def poured(packing: Packing, path: Path) -> Manifest:
    """Write the bytes of a packing to a new file, and digest each part beside it."""
    digest = xxhash.xxh3_128()

    with filling(path) as write:

        def both(part: memoryview) -> None:
            write(part)
            digest.update(part)

        packing.pour(both)
    return packing.manifest(digest.hexdigest())


def gathered(packing: Packing) -> tuple[Manifest, NDArray[np.uint8]]:
    """The same in memory, for a store that does not share this machine's disk."""
    buffer = np.empty(packing.size, np.uint8)
    whole, end = buffer.data, 0

    def write(part: memoryview) -> None:
        nonlocal end
        whole[end : end + len(part)] = part
        end += len(part)

    packing.pour(write)
    return packing.manifest(digest_of(buffer)), buffer


def identity_of(named: Iterable[tuple[str, NDArray[np.float32]]]) -> str:
    """One digest of a model's weights, by names and values, in whatever order they come.

    >>> a, b = ("a", np.zeros(2, np.float32)), ("b", np.ones(2, np.float32))
    >>> identity_of([a, b]) == identity_of([b, a]) != identity_of([a, ("b", b[1] + 1)])
    True
    """
    rows = sorted(
        f"{name} {list(array.shape)} {hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()}"
        for name, array in named
    )
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


LORA_B, LORA_A = ".lora_B", ".lora_A"


def factors_of(tensors: Iterable[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """An adapter's tensors: weight -> (lora_B, lora_A), whose product has the weight's shape.

    Raises:
        WeightsError: a tensor that is neither, a factor without the other, or two that cannot be multiplied.

    >>> b, a = layout([("w.lora_B", "float32", (6, 2)), ("w.lora_A", "float32", (2, 4))])
    >>> factors_of([a, b]) == {"w": (b, a)}
    True
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    weights = {name.removesuffix(LORA_B).removesuffix(LORA_A) for name in by_name}
    expected = {weight + factor for weight in weights for factor in (LORA_B, LORA_A)}
    if odd := sorted(expected ^ by_name.keys()):
        raise WeightsError(
            f"an adapter has a {LORA_B} and a {LORA_A} for each of its weights, but {odd[0]} stands alone"
        )
    found = {weight: (by_name[weight + LORA_B], by_name[weight + LORA_A]) for weight in sorted(weights)}
    for weight, (b, a) in found.items():
        if not (len(a.shape) == len(b.shape) == 2 and b.shape[1] == a.shape[0]):
            raise WeightsError(f"adapter of {weight}: {list(b.shape)} times {list(a.shape)} is no product")
    return found


def view_of(buffer: NDArray[np.uint8], tensor: Tensor) -> NDArray[Any]:
    """One parameter as a view of the flat buffer; bfloat16 as uint16, because numpy has none."""
    flat = buffer[tensor.offset : tensor.offset + tensor.size]
    return flat.view(_NUMPY_DTYPE[tensor.dtype]).reshape(tensor.shape)


def mapped(handle: WeightHandle) -> NDArray[np.uint8]:
    """The buffer of a handle, mapped read-only.

    Raises:
        VersionGoneError: the file was deleted since the handle was given out.
        WeightsError: the file is shorter than the manifest says.
    """
    buffer = map_file(handle.path)
    expected = buffer_bytes(handle.manifest.tensors)
    if buffer.size < expected:
        raise WeightsError(f"{handle.path}: {buffer.size} bytes, the manifest describes {expected}: publish it again")
    return buffer


def views(handle: WeightHandle) -> Mapping[str, NDArray[Any]]:
    """Every parameter by name, as read-only views of the mapped buffer; bfloat16 as uint16."""
    buffer = mapped(handle)
    return {tensor.name: view_of(buffer, tensor) for tensor in handle.manifest.tensors}


def to_json(manifest: Manifest) -> str:
    """The manifest as it lies beside the buffer."""
    return json.dumps(
        {
            "version": manifest.version,
            "step": manifest.step,
            "epoch": manifest.epoch,
            "digest": manifest.digest,
            "tolerance": manifest.tolerance,
            "adapter": None if manifest.adapter is None else asdict(manifest.adapter),
            "tensors": [
                {"name": t.name, "dtype": t.dtype, "shape": list(t.shape), "offset": t.offset, "size": t.size}
                for t in manifest.tensors
            ],
            "probes": [
                {"tokens": probe.tokens_T.tolist(), "logprobs": probe.logprob_T.tolist()} for probe in manifest.probes
            ],
        }
    )


def from_json(text: str, *, source: str) -> Manifest:
    """The manifest of `to_json`.

    Raises:
        WeightsError: the text is not a manifest; the message names `source`.
    """
    try:
        data = json.loads(text)
        return Manifest(
            version=int(data["version"]),
            step=int(data["step"]),
            epoch=int(data["epoch"]),
            digest=str(data["digest"]),
            tolerance=float(data["tolerance"]),
            adapter=None if data.get("adapter") is None else Adapter(**data["adapter"]),
            tensors=tuple(Tensor(**{**t, "shape": tuple(t["shape"])}) for t in data["tensors"]),
            probes=tuple(
                Probe(tokens_T=np.array(p["tokens"], np.int32), logprob_T=np.array(p["logprobs"], np.float32))
                for p in data["probes"]
            ),
        )
    except (ValueError, KeyError, TypeError) as caught:
        raise WeightsError(
            f"{source}: not a weight manifest ({type(caught).__name__}: {caught}): publish it again"
        ) from None


def write(
    directory: str | os.PathLike[str],
    manifest: Manifest,
    buffer: NDArray[np.uint8],
    *,
    half: Callable[[], None] | None = None,
) -> WeightHandle:
    """Write one version: the buffer under a temporary name, renamed, then the manifest likewise.

    Args:
        half: called when the buffer is there and the manifest is not yet.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = temporary_of(folder)
    try:
        fill(temporary, buffer)
        return place(folder, manifest, temporary, half=half)
    finally:  # where there was no room for it, its beginning must not take what there is
        temporary.unlink(missing_ok=True)


def temporary_of(folder: Path) -> Path:
    """A name that nobody else has, for what is not whole yet."""
    return folder / f"version_{uuid4().hex}.tmp"


def place(folder: Path, manifest: Manifest, temporary: Path, *, half: Callable[[], None] | None = None) -> WeightHandle:
    """Make a version of a file that holds its buffer, in the same folder: rename it, then write the manifest.

    Raises:
        VersionGoneError: the file is not there.
    """
    bytes_path = folder / f"version_{manifest.version:08d}.bin"
    try:
        temporary.rename(bytes_path)
    except FileNotFoundError:
        raise VersionGoneError(f"{temporary} was deleted before it became a version: write it again") from None
    if half is not None:
        half()
    text = temporary.with_suffix(".json.tmp")
    try:
        text.write_text(to_json(manifest))
        text.rename(bytes_path.with_suffix(".json"))
    finally:
        text.unlink(missing_ok=True)
    return WeightHandle(manifest=manifest, path=str(bytes_path))
