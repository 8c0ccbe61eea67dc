"""Payloads on disk: Arrow record batches one after the other, in files that any Arrow reader opens once they are full.

A segment that is written to is named `_000007.arrow` and holds the beginning of an Arrow IPC file: the mark, the
schema, a message per pack. Sealing adds the footer and takes the underscore away. No offset changes by it, and readers
of the folder leave out names that begin with an underscore.
"""

import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
from isal import isal_zlib

from millrace.core.failpoint import armed, reach
from millrace.core.schema import MARK, SCHEMA

FOLDER = "rollouts"
HEAD = b"ARROW1\0\0" + SCHEMA.serialize().to_pybytes()

_BLOCK = struct.Struct("<qi4xq")  # of a footer: where a batch begins, bytes of its metadata, and of its body
_EMPTY = pa.RecordBatch.from_pylist([], schema=SCHEMA)
_EMPTY_MESSAGE = memoryview(_EMPTY.serialize())


class Place(NamedTuple):
    """Where a pack lies: its message, without the mark of a pack."""

    segment: int
    offset: int
    length: int
    crc32: int


@dataclass(slots=True)
class Segment:
    """The one of its kind that is written to."""

    number: int
    path: Path
    fd: int
    end: int


class Segments:
    """The files of one folder."""

    def __init__(self, folder: Path, *, first: int) -> None:
        """Args: first: the number of the next segment; none was ever given out from it on."""
        self.folder = folder
        self._next = first
        self._open: dict[bool, Segment] = {}
        self.paths: tuple[Path, ...] = ()  # of those that are written to

    def append(self, messages: Sequence[tuple[bool, memoryview]]) -> list[Place]:
        """Write these messages, each to the segment of its kind (kept or not). All or none.

        Raises:
            OSError: with nothing written, as far as a reader can tell.
        """
        places = []
        before: dict[bool, int] = {}
        try:
            for kept, message in messages:
                segment = self._segment(kept)
                before.setdefault(kept, segment.end)
                _write(segment, message)
                places.append(Place(segment.number, segment.end, len(message), isal_zlib.crc32(message)))
                segment.end += len(message)
        except OSError:
            for kept, end in before.items():
                self._cut(kept, end)
            raise
        return places

    def _segment(self, kept: bool) -> Segment:
        if kept not in self._open:
            path = self.folder / f"_{self._next:06}.arrow"
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            segment = Segment(self._next, path, fd, 0)
            self._next += 1
            try:
                _write(segment, memoryview(HEAD))
            except OSError:
                os.close(fd)
                path.unlink()
                raise
            segment.end = len(HEAD)
            self._open[kept] = segment
            self._listed()
        return self._open[kept]

    def _cut(self, kept: bool, end: int) -> None:
        """Take back what a failed write left. Where that fails too, the segment is not written to any more."""
        segment = self._open[kept]
        segment.end = end
        try:
            os.ftruncate(segment.fd, end)
        except OSError:
            self.close(kept)

    def close(self, kept: bool) -> Segment:
        """Write no more to it. Sealing it is left."""
        segment = self._open.pop(kept)
        self._listed()
        os.close(segment.fd)
        return segment

    def _listed(self) -> None:
        self.paths = tuple(segment.path for segment in self._open.values())

    def leave(self, number: int) -> None:
        """Write no more to this one, if it is written to: it does not give back what it was given."""
        for kept, segment in self.open.items():
            if segment.number == number:
                self.close(kept)

    def full(self, limit_bytes: int) -> list[bool]:
        """The kinds whose segment has reached its size."""
        return [kept for kept, segment in self._open.items() if segment.end >= limit_bytes]

    @property
    def open(self) -> dict[bool, Segment]:
        """The segments that are written to."""
        return dict(self._open)

    def path(self, segment: int) -> Path:
        """Where it is now; sealing may rename it at any moment."""
        sealed = self.folder / f"{segment:06}.arrow"
        return sealed if sealed.exists() else self.folder / f"_{segment:06}.arrow"

    def read(self, place: Place) -> bytes:
        """A pack.

        Raises:
            OSError: the file is gone or cannot be read.
            ValueError: what lies there is not what was written.
        """
        try:
            message = _read(self.path(place.segment), place)
        except FileNotFoundError:  # renamed between the look and the opening
            message = _read(self.path(place.segment), place)
        if len(message) < place.length:
            raise ValueError(f"it ends after {len(message)} of {place.length} bytes at offset {place.offset}")
        if isal_zlib.crc32(message) != place.crc32:
            raise ValueError(f"{place.length} bytes at offset {place.offset} have another checksum than when written")
        return MARK + message

    @property
    def bytes(self) -> int:
        """Of all files together."""
        return sum(path.stat().st_size for path in self.numbers().values())

    def numbers(self) -> dict[int, Path]:
        """All that are there."""
        paths = sorted(self.folder.glob("*.arrow"))
        return {int(path.stem.lstrip("_")): path for path in paths if path.stem.lstrip("_").isdigit()}


def _write(segment: Segment, data: memoryview) -> None:
    """At the segment's end; a write may be short just before a disk is full."""
    at = 0
    if armed() and segment.end:
        at = os.pwrite(segment.fd, data[: len(data) // 2], segment.end)
        reach("journal.store.torn")
    while at < len(data):
        at += os.pwrite(segment.fd, data[at:], segment.end + at)


def _read(path: Path, place: Place) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(fd, place.length, place.offset)
    finally:
        os.close(fd)


def sealed(path: Path) -> bool:
    """Whether an Arrow reader finds its batches."""
    if path.name.startswith("_"):
        return False
    try:
        with pa.memory_map(str(path)) as file:
            return bool(pa.ipc.open_file(file).num_record_batches)
    except (pa.ArrowException, OSError, ValueError):
        return False


def seal(path: Path, places: Iterable[Place]) -> str:
    """Cut a segment after the last of these packs, add the footer, and take the underscore away.

    Returns:
        What keeps it from being sealed; empty if nothing does. Its packs can be read either way.
    Raises:
        OSError: the disk.
    """
    known = sorted(places, key=lambda place: place.offset)
    if not known:
        path.unlink()
        return ""
    if not path.name.startswith("_"):
        path = path.rename(path.with_name(f"_{path.name}"))
    end = known[-1].offset + known[-1].length
    with path.open("r+b") as file:
        if os.fstat(file.fileno()).st_size < end:
            return f"it ends before {end}, the end of its last pack"
        try:
            footer = _footer(path, end, known)
        except (pa.ArrowException, ValueError) as caught:
            return str(caught)
        reach("journal.seal")
        file.truncate(end)
        file.seek(end)
        file.write(footer)
        file.flush()
        os.fdatasync(file.fileno())
        # Nobody reads it soon, and the next segment takes its pages.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    path.rename(path.with_name(path.name.lstrip("_")))
    return ""


def _footer(path: Path, end: int, known: Sequence[Place]) -> bytes:
    """What Arrow's own writer puts behind these batches: behind empty ones, whose places are replaced by theirs."""
    with pa.memory_map(str(path)) as file:
        whole = file.read_buffer(end)
        if whole[: len(HEAD)].to_pybytes() != HEAD:
            raise ValueError("it does not begin with this version's schema")
        for place in known:
            if isal_zlib.crc32(whole[place.offset : place.offset + place.length]) != place.crc32:
                raise ValueError(f"its pack at offset {place.offset} has another checksum than when written")
        theirs = b"".join(_block(place.offset, memoryview(whole[place.offset :])[: place.length]) for place in known)
    sink, size = pa.BufferOutputStream(), len(_EMPTY_MESSAGE)
    with pa.ipc.new_file(sink, SCHEMA) as writer:
        for _ in known:
            writer.write_batch(_EMPTY)
    footer: bytes = sink.getvalue()[len(HEAD) + len(known) * size :].to_pybytes()
    empty = b"".join(_block(len(HEAD) + at * size, _EMPTY_MESSAGE) for at in range(len(known)))
    if footer.count(empty) != 1:
        raise ValueError(f"Arrow {pa.__version__} writes another footer than millrace knows")
    return footer.replace(empty, theirs)


def _block(offset: int, message: memoryview) -> bytes:
    """A batch's place in a footer. Its message begins with a mark and the size of what follows, four bytes each."""
    metadata = 8 + int(struct.unpack_from("<i", message, 4)[0])
    return _BLOCK.pack(offset, metadata, len(message) - metadata)
