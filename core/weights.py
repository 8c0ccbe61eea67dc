"""Published weights on disk: one flat buffer and one JSON manifest per version, and the store that keeps them.

A version is complete exactly when its manifest is there: the buffer is written and renamed first. Both files are
never changed afterwards, so a reader that has mapped a buffer keeps reading it even after it was deleted.
"""

import asyncio
import hashlib
import json
import math
import os
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from millrace.core.errors import WeightsError
from millrace.core.protocols import Manifest, Probe, Tensor, WeightHandle

ALIGNMENT_BYTES = 64  # a cache line, and the widest vector load
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_NUMPY_DTYPE: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(np.uint16),
    "float16": np.dtype(np.float16),
}


class VersionGoneError(WeightsError):
    """The buffer of a handle was deleted before it was mapped: newer versions exist, fetch again."""


class Upstream(Protocol):
    """Another store that serves whole versions, usually on another machine."""

    async def read(self, version: int) -> tuple[str, NDArray[np.uint8]]:
        """The manifest as JSON and the buffer of `version`, or of the newest if that one is gone."""
        ...


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
    """SHA-256 of the bytes, hexadecimal.

    >>> digest_of(np.zeros(0, np.uint8))[:8]
    'e3b0c442'
    """
    return hashlib.sha256(np.ascontiguousarray(buffer).data).hexdigest()


def view_of(buffer: NDArray[np.uint8], tensor: Tensor) -> NDArray[Any]:
    """One parameter as a view of the flat buffer; bfloat16 as uint16, because numpy has none."""
    flat = buffer[tensor.offset : tensor.offset + tensor.size]
    return flat.view(_NUMPY_DTYPE[tensor.dtype]).reshape(tensor.shape)


def map_file(path: str, *, mode: Literal["r", "c"] = "r") -> NDArray[np.uint8]:
    """A published buffer, mapped read-only ("r") or copy-on-write ("c", for libraries that want writable memory).

    Raises:
        VersionGoneError: the file was deleted since its handle was given out.
        WeightsError: it is empty.
    """
    try:
        return np.memmap(path, np.uint8, mode=mode)
    except FileNotFoundError:
        raise VersionGoneError(f"{path} was deleted before it was mapped: a newer version exists, fetch it") from None
    except ValueError as caught:
        raise WeightsError(f"{path}: cannot be mapped: {caught}") from None


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


def write(directory: str | os.PathLike[str], manifest: Manifest, buffer: NDArray[np.uint8]) -> WeightHandle:
    """Write one version: the buffer under a temporary name, renamed, then the manifest likewise."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"version_{manifest.version:08d}"
    bytes_path, json_path = folder / f"{stem}.bin", folder / f"{stem}.json"
    temporary = folder / f"{stem}.{os.getpid()}.{threading.get_ident()}.tmp"
    with temporary.open("wb") as file:
        file.write(np.ascontiguousarray(buffer).data)
    temporary.rename(bytes_path)
    temporary.write_text(to_json(manifest))
    temporary.rename(json_path)
    return WeightHandle(manifest=manifest, path=str(bytes_path))


class FileWeightStore:
    """The last `keep` published versions, on this machine's disk; reloads them when it is built.

    Args:
        directory: where the versions lie; created when missing.
        keep: versions held, at least 1.
        upstream: the store to pull versions from that are not here, for machines other than the learner's.
        hold_every: versions of every so-many-th step stay until `release`d, for evaluation; 0 for none.
        hold_last: the version of this step stays too.
    """

    def __init__(
        self,
        directory: str,
        keep: int = 2,
        upstream: Upstream | None = None,
        *,
        hold_every: int = 0,
        hold_last: int | None = None,
    ) -> None:
        if keep < 1:
            raise WeightsError(f"keep = {keep}: a weight store holds at least 1 version")
        self._directory = Path(directory)
        self._directory.mkdir(parents=True, exist_ok=True)
        self._keep = keep
        self._upstream = upstream
        self._hold_every, self._hold_last = hold_every, hold_last
        self._held: set[int] = set()
        self._handles: dict[int, WeightHandle] = {}
        self._highest: int | None = None
        self._writing = threading.Lock()
        self._pulling: dict[int, asyncio.Task[WeightHandle]] = {}
        self.ignored: dict[str, str] = {}  # file -> why it was not loaded
        self._reload()

    @property
    def versions(self) -> tuple[int, ...]:
        """The versions held here, ascending."""
        return tuple(sorted(self._handles))

    async def publish(self, manifest: Manifest, buffer: NDArray[np.uint8]) -> None:
        """Keep a new version.

        Raises:
            WeightsError: the version is not above all earlier ones, or the bytes are not those of the manifest.
        """
        await asyncio.to_thread(self._publish, manifest, buffer)

    async def fetch(self, version: int) -> WeightHandle:
        """The handle of `version`, or of the newest if that one is gone. Waits for neither.

        Raises:
            WeightsError: nothing has been published.
        """
        if version in self._handles:
            return self._handles[version]
        if self._upstream is not None:
            return await self._pull(version)
        return self._newest()

    async def held(self) -> tuple[int, ...]:
        """The versions that wait to be released, ascending."""
        return tuple(sorted(self._held))

    async def release(self, version: int) -> None:
        """The version is no longer held for anybody. Repeating it does no harm."""
        await asyncio.to_thread(self._release, version)

    async def read(self, version: int) -> tuple[str, NDArray[np.uint8]]:
        """The manifest as JSON and the bytes, of `version` or of the newest; for stores on other machines."""
        handle = self._handles.get(version) or self._newest()
        return to_json(handle.manifest), await asyncio.to_thread(lambda: np.array(mapped(handle)))

    def _newest(self) -> WeightHandle:
        if not self._handles:
            raise WeightsError(f"{self._directory}: no weights were published yet: publish version 0 first")
        return self._handles[max(self._handles)]

    async def _pull(self, version: int) -> WeightHandle:
        # Engines of one machine that ask for the same version share one transfer.
        task = self._pulling.get(version)
        if task is None:
            task = self._pulling[version] = asyncio.create_task(self._pull_once(version))
            task.add_done_callback(lambda _: self._pulling.pop(version, None))
        return await asyncio.shield(task)

    async def _pull_once(self, version: int) -> WeightHandle:
        assert self._upstream is not None
        text, buffer = await self._upstream.read(version)
        manifest = from_json(text, source=f"upstream, version {version}")
        if manifest.version not in self._handles:
            await asyncio.to_thread(self._keep_pulled, manifest, buffer)
        return self._handles.get(manifest.version) or self._newest()

    def _keep_pulled(self, manifest: Manifest, buffer: NDArray[np.uint8]) -> None:
        with self._writing:
            # An older version may arrive after a newer one; it is then not worth a file.
            if self._highest is None or manifest.version > self._highest:
                self._store(manifest, buffer)

    def _publish(self, manifest: Manifest, buffer: NDArray[np.uint8]) -> None:
        with self._writing:
            known = self._handles.get(manifest.version)
            if known is not None and known.manifest.digest == manifest.digest:
                return  # a repetition: the first answer was lost
            if self._highest is not None and manifest.version <= self._highest:
                raise WeightsError(
                    f"version {manifest.version} cannot be published: version {self._highest} was, and versions are "
                    "never reused; reserve a new one at the ledger"
                )
            self._store(manifest, buffer)

    def _store(self, manifest: Manifest, buffer: NDArray[np.uint8]) -> None:
        expected = buffer_bytes(manifest.tensors)
        if buffer.dtype != np.uint8 or buffer.ndim != 1 or buffer.size < expected:
            raise WeightsError(
                f"version {manifest.version}: the buffer is {buffer.dtype} of shape {buffer.shape}, the manifest "
                f"describes {expected} bytes: pack the parameters by `layout`"
            )
        digest = digest_of(buffer)
        if digest != manifest.digest:
            raise WeightsError(
                f"version {manifest.version}: the bytes have digest {digest[:12]}, the manifest says "
                f"{manifest.digest[:12]}: they changed on the way; publish again"
            )
        handle = write(self._directory, manifest, buffer)
        self._handles[manifest.version] = handle
        self._highest = manifest.version
        if (self._hold_every and manifest.step % self._hold_every == 0) or manifest.step == self._hold_last:
            self._held.add(manifest.version)
        self._trim()

    def _release(self, version: int) -> None:
        with self._writing:
            self._held.discard(version)
            self._trim()

    def _trim(self) -> None:
        for version in self.versions[: -self._keep]:
            if version not in self._held:
                self._delete(self._handles.pop(version).path)

    def _reload(self) -> None:
        for json_path in sorted(self._directory.glob("version_*.json")):
            try:
                manifest = from_json(json_path.read_text(), source=str(json_path))
                handle = WeightHandle(manifest=manifest, path=str(json_path.with_suffix(".bin")))
                if digest_of(mapped(handle)) != manifest.digest:
                    raise WeightsError(f"{handle.path}: its bytes do not have the manifest's digest")
            except WeightsError as caught:
                self.ignored[json_path.name] = str(caught)
                # A number that once named other bytes is not given out again.
                self._highest = max(self._highest or 0, int(json_path.stem.removeprefix("version_")))
                continue
            self._handles[manifest.version] = handle
        if self._handles:
            self._highest = max(max(self._handles), -1 if self._highest is None else self._highest)
        for stray in (*self._directory.glob("version_*.tmp"), *self._directory.glob("version_*.bin")):
            if stray.suffix == ".tmp" or not stray.with_suffix(".json").exists():
                self.ignored[stray.name] = "it was being written when its writer ended"
                stray.unlink(missing_ok=True)
        for version in self.versions[: -self._keep]:
            self._delete(self._handles.pop(version).path)

    @staticmethod
    def _delete(path: str) -> None:
        # The manifest first: without it the bytes count as unfinished.
        Path(path).with_suffix(".json").unlink(missing_ok=True)
        Path(path).unlink(missing_ok=True)
