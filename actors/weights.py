"""The receiving end of published weights: fetch while generating, prove, swap."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import numpy as np

from millrace.core.errors import WeightsError
from millrace.core.failpoint import reach
from millrace.core.protocols import Engine, Manifest, Proof, WeightHandle, WeightStore
from millrace.core.types import Floats, Ints
from millrace.core.weights import VersionGoneError, digest_of, mapped


def check_digest(handle: WeightHandle) -> str:
    """The digest of the bytes on disk.

    Raises:
        WeightsError: it is not the manifest's.
    """
    manifest = handle.manifest
    digest = digest_of(mapped(handle))
    if digest != manifest.digest:
        raise WeightsError(
            f"version {manifest.version}: {handle.path} has digest {digest[:12]}, the manifest says "
            f"{manifest.digest[:12]}: the file was changed or damaged; publish again"
        )
    return digest


async def probe_gap(manifest: Manifest, score: Callable[[Ints], Awaitable[Floats]], *, longest: int) -> float | None:
    """Score the manifest's probes; the largest |difference|, nats, or None where it has none.

    Args:
        manifest: its probes are compared.
        score: the engine's log-probabilities of a sequence.
        longest: tokens that the engine can score; of longer probes the first `longest` are compared.

    Raises:
        WeightsError: it exceeds the manifest's tolerance.
    """
    if not manifest.probes:
        return None
    return check_probes(manifest, [await score(probe.tokens_T[:longest]) for probe in manifest.probes])


def check_probes(manifest: Manifest, scored: Sequence[Floats]) -> float:
    """The largest |difference| between published and scored log-probabilities, nats.

    Raises:
        WeightsError: it exceeds the manifest's tolerance, or is not a number.
    """
    largest = 0.0
    for number, (probe, logprob_T) in enumerate(zip(manifest.probes, scored, strict=True)):
        if not len(logprob_T):
            continue
        gap_T = np.abs(logprob_T.astype(np.float64) - probe.logprob_T[: len(logprob_T)])
        worst = int(np.argmax(np.where(np.isnan(gap_T), np.inf, gap_T)))
        if not gap_T[worst] <= manifest.tolerance:
            raise WeightsError(
                f"version {manifest.version}: probe {number}, token {worst + 1} has log-probability "
                f"{logprob_T[worst]:.6f} in the engine, {probe.logprob_T[worst]:.6f} were published: gap "
                f"{gap_T[worst]:.2e} nats, tolerance {manifest.tolerance:.0e}; the engine does not compute with the "
                "weights that were published: end it, and run check_wiring on this architecture"
            )
        largest = max(largest, float(gap_T[worst]))
    return largest


def check_names(manifest: Manifest, consumed: frozenset[str]) -> None:
    """Refuse a load that left published parameters aside.

    Raises:
        WeightsError: naming the parameters.
    """
    published = {tensor.name for tensor in manifest.tensors}
    if consumed != published:
        missing, extra = sorted(published - consumed), sorted(consumed - published)
        raise WeightsError(
            f"version {manifest.version}: the engine consumed other parameters than were published "
            f"(left aside: {_some(missing)}; unknown: {_some(extra)}): learner and engine hold different models"
        )


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5]) or "none"
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


_FETCHES = 4  # in a row, before versions that vanish before they are mapped count as an error


class WeightReceiver:
    """Keeps an engine at the newest published version.

    Args:
        engine: whose weights are swapped within running generations.
        store: where versions are fetched from, in the background.
        probe_every: probes are scored at the first load and at every k-th after it, or at the next one after these
            that was published with probes.
    """

    def __init__(self, engine: Engine, store: WeightStore, *, probe_every: int) -> None:
        if probe_every < 1:
            raise WeightsError(f"probe_every = {probe_every}: score the probes at least at every load, so 1 or more")
        self._engine = engine
        self._store = store
        self._probe_every = probe_every
        self._wanted = -1
        self._found: WeightHandle | None = None  # by `hear`, and not loaded yet
        self._turn = asyncio.Lock()
        self._since_proof: int | None = None  # loads; None before the first proof
        self.loads = 0
        self.skipped = 0  # versions fetched and overtaken before they were loaded

    async def hear(self, *, wait_s: float) -> int:
        """The newest version there is, as soon as it is newer than what is known here; -1 after `wait_s` seconds."""
        than = max(self._wanted, self._engine.version, self._found.manifest.version if self._found else -1)
        handle = await self._store.newer(than=than, wait_s=wait_s)
        if handle is None:
            return -1
        self._found = handle
        return handle.manifest.version

    async def follow(self, version: int) -> Proof | None:
        """Bring the engine to `version` or a newer one; None when it already is there, or nothing newer is held.

        Raises:
            WeightsError: what arrived is not what was published. Fatal for the worker that owns the engine.
        """
        self._wanted = max(self._wanted, version)
        async with self._turn:
            if self._wanted <= self._engine.version:
                return None
            handle = await self._fetch()
            if handle.manifest.version <= self._engine.version:
                return None
            return await self._load(handle)

    async def _fetch(self) -> WeightHandle:
        target = self._wanted
        found, self._found = self._found, None
        if found is not None and found.manifest.version >= target:
            return found
        handle = await self._store.fetch(target)
        if self._wanted > max(target, handle.manifest.version):
            # Overtaken while fetching. Once only: a fetch slower than publishing must not keep the engine waiting.
            self.skipped += 1
            handle = await self._store.fetch(self._wanted)
        return handle

    async def _load(self, handle: WeightHandle) -> Proof:
        due = self._since_proof is None or self._since_proof + 1 >= self._probe_every
        for _ in range(_FETCHES):
            try:
                reach("weights.load.before")
                proof = await self._engine.load(handle, prove=due)
                break
            except VersionGoneError:
                handle = await self._store.fetch(self._wanted)
        else:
            raise WeightsError(
                f"version {handle.manifest.version}: {_FETCHES} fetched versions in a row were deleted before the "
                "engine could map them: keep more versions in the weight store"
            )
        manifest = handle.manifest
        check_names(manifest, proof.consumed)
        if (proof.version, proof.digest) != (manifest.version, manifest.digest):
            raise WeightsError(
                f"the engine answers version {proof.version}, digest {proof.digest[:12]}; version {manifest.version}, "
                f"digest {manifest.digest[:12]} was handed to it: end the engine"
            )
        self.loads += 1
        if proof.probe_gap is not None:
            self._since_proof = 0
        elif self._since_proof is not None:
            self._since_proof += 1
        return proof
