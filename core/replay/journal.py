"""What survives a crash of the queue: records of every change, and the payload rows they point to.

A *record* is plain data (str, int, float, bool, None, lists and dicts with str keys), so that it can be a row of a
table or a line of JSON. Applying a journal's records to a fresh ledger, in order, reproduces the ledger.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

Record = dict[str, Any]
Location = tuple[int, int]  # (segment, row in it)


class Journal(Protocol):
    """Payloads first, then the record that names their locations, then `flush`."""

    def append(self, record: Record) -> None:
        """Add one record; it is whole or absent after a crash."""
        ...

    def records(self) -> Iterator[Record]:
        """All records of earlier lives, oldest first."""
        ...

    def store(self, pack: bytes, rows: Sequence[int]) -> list[Location]:
        """Keep these rows of a pack; one location for each."""
        ...

    def load(self, location: Location) -> tuple[bytes, int]:
        """The pack that holds the row, and its number in it."""
        ...

    def holds(self, location: Location) -> bool:
        """Whether the row is there: it was stored, survived, and was not forgotten."""
        ...

    def forget(self, location: Location) -> None:
        """The row is needed no more. Repeating it does no harm."""
        ...

    def flush(self) -> None:
        """Return when everything appended and stored so far would survive a kill of this process."""
        ...


class MemoryJournal:
    """A journal that lives as long as the process. A pack is freed with the last of its rows.

    >>> journal = MemoryJournal()
    >>> first, second = journal.store(b"pack", [0, 2])
    >>> journal.load(second)
    (b'pack', 2)
    >>> journal.forget(first); journal.forget(second); journal.bytes
    0
    """

    def __init__(self, *, keep_records: bool = False) -> None:
        self._keep = keep_records
        self._records: list[Record] = []
        self._packs: dict[int, bytes] = {}
        self._rows: dict[int, set[int]] = {}
        self._segments = 0

    def append(self, record: Record) -> None:
        if self._keep:
            self._records.append(record)

    def records(self) -> Iterator[Record]:
        return iter(tuple(self._records))

    def store(self, pack: bytes, rows: Sequence[int]) -> list[Location]:
        segment = self._segments
        self._segments += 1
        if rows:
            self._packs[segment] = pack
            self._rows[segment] = set(rows)
        return [(segment, row) for row in rows]

    def load(self, location: Location) -> tuple[bytes, int]:
        segment, row = location
        return self._packs[segment], row

    def holds(self, location: Location) -> bool:
        segment, row = location
        return row in self._rows.get(segment, ())

    def forget(self, location: Location) -> None:
        segment, row = location
        rows = self._rows.get(segment)
        if rows is None:
            return
        rows.discard(row)
        if not rows:
            del self._rows[segment], self._packs[segment]

    def flush(self) -> None:
        """There is no later moment at which a record is safer."""

    @property
    def bytes(self) -> int:
        """Of the packs it still holds."""
        return sum(len(pack) for pack in self._packs.values())


class LineJournal(MemoryJournal):
    """Records in a file, a line of JSON each; payloads in memory.

    After a crash the ledger knows every draw again. Groups that were not committed have lost their payload and are
    drawn again. A line that a crash tore is left out, and written over.

    Every record is handed to the system as it is appended. What a journal kept for later, it could write when it is
    thrown away: into the file of the next journal, where a run is resumed in the process in which it was ended.
    """

    def __init__(self, path: str | Path) -> None:
        """Args: path of the file. It is opened by `records`: until then the journal can go to another process."""
        super().__init__()
        self._path = Path(path)
        self._file: BinaryIO | None = None

    def append(self, record: Record) -> None:
        assert self._file is not None, "records() is read before anything is appended"
        self._file.write(json.dumps(record, separators=(",", ":")).encode() + b"\n")
        self._file.flush()

    def records(self) -> Iterator[Record]:
        whole = self._path.read_bytes().rpartition(b"\n")[:2] if self._path.exists() else (b"", b"")
        size = sum(map(len, whole))
        self._file = self._path.open("r+b" if self._path.exists() else "w+b")
        self._file.truncate(size)
        self._file.seek(size)
        # Every segment of an earlier life has a record longer than one byte, so no number is given out twice.
        self._segments = size
        return map(json.loads, whole[0].splitlines())
