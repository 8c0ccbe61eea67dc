"""The store of published weights: the last versions on disk, and those that an evaluation waits for.

It outlives the learner: whoever restarts finds the versions where they were. What it must know after a restart of its
own lies on the disk, too: a version is held until the mark of its release is there.
"""

import asyncio
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from millrace.core.errors import WeightsError
from millrace.core.failpoint import reach
from millrace.core.protocols import Manifest, Packing, WeightHandle
from millrace.core.weight_files import VersionGoneError, let_go
from millrace.core.weights import (
    buffer_bytes,
    digest_of,
    from_json,
    gathered,
    mapped,
    place,
    poured,
    temporary_of,
    to_json,
    write,
)

MARK = "store-"
RELEASED = ".released"
ATTEMPTS = 4  # at writing a version that a store that starts again takes for a stray


class Upstream(Protocol):
    """Another store that serves whole versions, usually on another machine."""

    async def read(self, version: int) -> tuple[str, NDArray[np.uint8]]:
        """The manifest as JSON and the buffer of `version`, or of the newest if that one is gone."""
        ...


class FileWeightStore:
    """The last `keep` published versions, on this machine's disk; reloads them when it is built.

    Args:
        directory: where the versions lie; created when missing.
        keep: versions held, at least 1.
        upstream: the store to pull versions from that are not here, for machines other than the learner's.
        hold_every: versions of every so-many-th step stay until `release`d, for evaluation; 0 for none. Those that an
            earlier store of this directory held are held again.
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
        self._waiting: set[asyncio.Future[None]] = set()  # for a newer version
        self.ignored: dict[str, str] = {}  # file -> why it was not loaded
        self._reload()
        for old in self._directory.glob(f"{MARK}*"):
            old.unlink()
        self._mark = self._directory / f"{MARK}{uuid4().hex}"
        self._mark.touch()

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
        self._wake()

    async def pour(self, packing: Packing) -> Manifest:
        """As `NodeStore.pour`, of a caller in this process."""
        manifest, buffer = await asyncio.to_thread(gathered, packing)
        await self.publish(manifest, buffer)
        return manifest

    async def adopt(self, manifest: Manifest, path: str) -> None:
        """Keep a new version whose bytes lie in a file of this store's folder already; it becomes the version's own.

        Nobody reads the bytes here: whoever loads a version compares them with the digest.

        Raises:
            VersionGoneError: the file is not there; write it again.
            WeightsError: as `publish`.
        """
        await asyncio.to_thread(self._adopt, manifest, Path(path))
        self._wake()

    async def newer(self, *, than: int, wait_s: float) -> WeightHandle | None:
        """The newest version, as soon as it is above `than`; None after `wait_s` seconds without one."""
        with suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                while not self._handles or max(self._handles) <= than:
                    future = asyncio.get_running_loop().create_future()
                    self._waiting.add(future)
                    try:
                        await future
                    finally:
                        self._waiting.discard(future)
                return self._newest()
        return None

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

    async def mark(self) -> str:
        """A file of this store alone: whoever sees it shares the store's disk."""
        return str(self._mark)

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

    def _wake(self) -> None:
        for future in tuple(self._waiting):  # of whichever event loop
            future.get_loop().call_soon_threadsafe(_settle, future)

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
            if not self._known(manifest):
                self._store(manifest, buffer)

    def _adopt(self, manifest: Manifest, path: Path) -> None:
        try:
            with self._writing:
                if self._known(manifest):
                    return
                if (found := path.stat().st_size if path.exists() else None) != buffer_bytes(manifest.tensors):
                    raise VersionGoneError(
                        f"version {manifest.version}: {path} has {found} bytes, the manifest describes "
                        f"{buffer_bytes(manifest.tensors)}: write it again"
                    )
                self._take_in(place(self._directory, manifest, path, half=lambda: reach("weights.publish.half")))
        finally:
            path.unlink(missing_ok=True)

    def _known(self, manifest: Manifest) -> bool:
        """Whether it is here already, because the first answer was lost."""
        known = self._handles.get(manifest.version)
        if known is not None and known.manifest.digest == manifest.digest:
            return True
        if self._highest is not None and manifest.version <= self._highest:
            raise WeightsError(
                f"version {manifest.version} cannot be published: version {self._highest} was, and versions are "
                "never reused; reserve a new one at the ledger"
            )
        return False

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
        self._take_in(write(self._directory, manifest, buffer, half=lambda: reach("weights.publish.half")))

    def _take_in(self, handle: WeightHandle) -> None:
        manifest = handle.manifest
        self._handles[manifest.version] = handle
        self._highest = manifest.version
        self._hold(manifest)
        self._trim()

    def _hold(self, manifest: Manifest) -> None:
        if (self._hold_every and manifest.step % self._hold_every == 0) or manifest.step == self._hold_last:
            self._held.add(manifest.version)

    def _release(self, version: int) -> None:
        with self._writing:
            if version in self._held:
                # First the mark, then the files: whoever restarts in between does not hold it again.
                Path(self._handles[version].path).with_suffix(RELEASED).touch()
                self._held.discard(version)
            self._trim()

    def _trim(self) -> None:
        for version in self.versions[: -self._keep]:
            if version not in self._held:
                self._delete(self._handles.pop(version).path)

    def _reload(self) -> None:
        for json_path in sorted(self._directory.glob("version_*.json")):
            try:
                manifest = from_json(json_path.read_text(errors="replace"), source=str(json_path))
                handle = WeightHandle(manifest=manifest, path=str(json_path.with_suffix(".bin")))
                if digest_of(mapped(handle)) != manifest.digest:
                    raise WeightsError(f"{handle.path}: its bytes do not have the manifest's digest")
            except WeightsError as caught:
                self.ignored[json_path.name] = str(caught)
                # A number that once named other bytes is not given out again.
                self._highest = max(self._highest or 0, int(json_path.stem.removeprefix("version_")))
                continue
            self._handles[manifest.version] = handle
            if not json_path.with_suffix(RELEASED).exists():
                self._hold(manifest)
        if self._handles:
            self._highest = max(max(self._handles), -1 if self._highest is None else self._highest)
        for stray in (*self._directory.glob("version_*.tmp"), *self._directory.glob("version_*.bin")):
            if stray.suffix == ".tmp" or not stray.with_suffix(".json").exists():
                self.ignored[stray.name] = "it was being written when its writer ended"
                stray.unlink(missing_ok=True)
        for mark in self._directory.glob(f"version_*{RELEASED}"):
            if not mark.with_suffix(".json").exists():
                mark.unlink(missing_ok=True)
        self._trim()

    @staticmethod
    def _delete(path: str) -> None:
        # The manifest first: without it the bytes count as unfinished.
        Path(path).with_suffix(".json").unlink(missing_ok=True)
        let_go(Path(path))
        Path(path).with_suffix(RELEASED).unlink(missing_ok=True)


class NodeStore:
    """The weight store as its callers see it: files in place where they share its disk, else copies of their own.

    Args:
        store: the run's `FileWeightStore`, or its handle.
    """

    def __init__(self, store: Any) -> None:
        self._store = store
        self._shared: Path | None = None  # the store's folder, where this process sees it
        self._near: Any = None  # where this process fetches from
        self._folder: tempfile.TemporaryDirectory[str] | None = None  # gone with the process

    def __reduce__(self) -> tuple[Any, ...]:
        return NodeStore, (self._store,)

    async def pour(self, packing: Packing) -> Manifest:
        """Publish to the run's store. On its disk the bytes are written here, once, and only their place is sent.

        Raises:
            WeightsError: as `FileWeightStore.publish`.
        """
        await self._look()
        if self._shared is None:
            manifest, buffer = await asyncio.to_thread(gathered, packing)
            await self._store.publish(manifest, buffer)
            return manifest
        for _ in range(ATTEMPTS - 1):
            with suppress(VersionGoneError):
                return await self._written_there(packing, self._shared)
        return await self._written_there(packing, self._shared)

    async def _written_there(self, packing: Packing, folder: Path) -> Manifest:
        """In a file of the store's folder, which becomes the version's own."""
        temporary = temporary_of(folder)
        try:
            manifest = await asyncio.to_thread(poured, packing, temporary)
            await self._store.adopt(manifest, str(temporary))
            return manifest
        finally:
            temporary.unlink(missing_ok=True)

    async def fetch(self, version: int) -> WeightHandle:
        """As `FileWeightStore.fetch`; elsewhere than on the store's disk it first copies the version here."""
        await self._look()
        handle: WeightHandle = await self._near.fetch(version)
        return handle

    async def newer(self, *, than: int, wait_s: float) -> WeightHandle | None:
        """As `FileWeightStore.newer`; copied as by `fetch`."""
        await self._look()
        handle: WeightHandle | None = await self._store.newer(than=than, wait_s=wait_s)
        return handle if handle is None or self._shared else await self.fetch(handle.manifest.version)

    async def held(self) -> tuple[int, ...]:
        """As `FileWeightStore.held`."""
        held: tuple[int, ...] = await self._store.held()
        return held

    async def release(self, version: int) -> None:
        """As `FileWeightStore.release`."""
        await self._store.release(version)

    async def _look(self) -> None:
        """Find out, once, whether the store's disk is this process's, too."""
        if self._near is not None:
            return
        mark = Path(await self._store.mark())
        if mark.exists():
            self._near, self._shared = self._store, mark.parent
        else:
            self._folder = tempfile.TemporaryDirectory(prefix="millrace-weights-")
            self._near = FileWeightStore(self._folder.name, upstream=self._store)


def _settle(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)
