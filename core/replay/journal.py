"""What survives a crash of the queue: records of every change, and the payload rows they point to.

A *record* is plain data (str, int, float, bool, None, lists and dicts with str keys), so that it can be a row of a
table or a line of JSON. Applying a journal's records to a fresh ledger, in order, reproduces the ledger.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import msgspec
from pydantic import Field

from millrace.core.config import Config
from millrace.core.schema import Pack

Record = dict[str, Any]
Location = tuple[int, int]  # (pack, row in it)

_FAST, _ANY = msgspec.json.Encoder().encode, json.JSONEncoder(separators=(",", ":"), check_circular=False).encode


def text_of(value: object) -> str:
    """Plain data as JSON; a number in it that is not finite becomes null.

    >>> text_of({"op": "late", "rows": [(3, 0)]}), text_of("half a pair: \\ud83d")
    ('{"op":"late","rows":[[3,0]]}', '"half a pair: \\\\ud83d"')
    """
    try:
        return _FAST(value).decode()
    except UnicodeEncodeError:  # half a surrogate pair, out of a model's own JSON
        return _ANY(value)


class JournalConfig(Config):
    """What of a run outlives its processes."""

    on_disk: bool = True
    """Keep the ledger and the rollouts in the run directory. Without it a killed queue loses the run's present."""

    keep_rollouts: Literal["all", "needed", "sample"] = "all"
    """Payloads that stay on disk: all; only those a kept checkpoint may still redo; or of these and every k-th draw."""

    sample_every: int = Field(default=16, ge=1)
    """k of `keep_rollouts = "sample"`."""

    segment_bytes: int = Field(default=64 << 20, ge=1 << 12)
    """Size at which a file of rollouts is closed and the next begun."""

    fsync_s: float = Field(default=0.1, gt=0)
    """What a loss of power may cost, at most. A killed process costs nothing that was accepted."""

    cache_bytes: int = Field(default=256 << 20, ge=0)
    """Payloads held in memory, so that a batch is not read from disk again."""


class Outcome(NamedTuple):
    """What became of one group, when nobody needs its payload any more."""

    location: Location
    draw: int
    attempt: int
    state: str  # committed | filtered | stale | failed; of a live group the state it is in
    steps: tuple[int, ...]  # that trained it
    rule: str  # that filtered or aged it, or the cause of its failure
    verdicts: Sequence[Sequence[Any]] | None  # per rollout (kind, score, components, feedback)
    lags: tuple[int, ...]  # per rollout, in the first of `steps`


class Journal(Protocol):
    """Payloads first, then the record that names their locations, then `flush`."""

    damage: list[str]  # what was found missing or broken, a line each

    @property
    def behind(self) -> int:
        """Records since the last image."""
        ...

    def compact(self, image: Record) -> None:
        """Replace all records by one that stands for them all. Whole or not at all after a crash."""
        ...

    def export(self, live: Sequence[Outcome]) -> int:
        """Write the rollouts as a table, `live` being the groups whose fate is not final. Returns its rows."""
        ...

    def close(self) -> None:
        """Nothing more is written; another process may open it."""
        ...

    def append(self, record: Record) -> None:
        """Add one record; it is whole or absent after a crash."""
        ...

    def records(self) -> Iterator[Record]:
        """All records of earlier lives, oldest first."""
        ...

    def store(self, pack: Pack, rows: Sequence[int], *, of: int) -> list[Location]:
        """Keep these of a pack's `of` rows; one location for each."""
        ...

    def load(self, location: Location) -> tuple[Pack, int]:
        """The pack that holds the row, and its number in it."""
        ...

    def holds(self, location: Location) -> bool:
        """Whether the row is there: it was stored, survived, and was not forgotten."""
        ...

    def forget(self, outcome: Outcome) -> None:
        """The group's payload is needed no more. Repeating it does no harm."""
        ...

    def flush(self) -> None:
        """Return when everything appended and stored so far would survive a kill of this process."""
        ...


class MemoryJournal:
    """A journal that lives as long as the process. A pack is freed with the last of its rows.

    >>> journal = MemoryJournal()
    >>> first, second = journal.store(b"pack", [0, 2], of=3)
    >>> journal.load(second)
    (b'pack', 2)
    >>> for location in (first, second):
    ...     journal.forget(Outcome(location, 0, 0, "committed", (0,), "", None, ()))
    >>> journal.bytes
    0
    """

    def __init__(self, *, keep_records: bool = False) -> None:
        self._keep = keep_records
        self._records: list[Record] = []
        self._packs: dict[int, Pack] = {}
        self._rows: dict[int, set[int]] = {}
        self._segments = 0
        self.damage: list[str] = []

    @property
    def behind(self) -> int:
        return len(self._records)

    def compact(self, image: Record) -> None:
        if self._keep:
            self._records = [image]

    def export(self, live: Sequence[Outcome]) -> int:
        """There is no place for a table."""
        return 0

    def close(self) -> None:
        """There is nothing to close."""

    def append(self, record: Record) -> None:
        if self._keep:
            self._records.append(record)

    def records(self) -> Iterator[Record]:
        return iter(tuple(self._records))

    def store(self, pack: Pack, rows: Sequence[int], *, of: int) -> list[Location]:
        segment = self._segments
        self._segments += 1
        if rows:
            self._packs[segment] = pack
            self._rows[segment] = set(rows)
        return [(segment, row) for row in rows]

    def load(self, location: Location) -> tuple[Pack, int]:
        segment, row = location
        return self._packs[segment], row

    def holds(self, location: Location) -> bool:
        segment, row = location
        return row in self._rows.get(segment, ())

    def forget(self, outcome: Outcome) -> None:
        segment, row = outcome.location
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
