"""The journal on disk: records and facts in one SQLite file, payloads in Arrow segments beside it.

A payload is written when it is stored; where it lies, and every record, with the next `flush`, in one row. So after
a kill there is no row without what it names, and what the last segment holds beyond its rows is cut off. A thread makes
it survive a loss of power as well, a moment later.
"""

import sqlite3
import weakref
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from threading import RLock
from typing import Any

from millrace.core import schema
from millrace.core.errors import JournalError, PayloadError
from millrace.core.failpoint import reach
from millrace.core.replay import ledger_file, ledger_rows, rollouts, segments
from millrace.core.replay.journal import JournalConfig, Location, Outcome, Record, text_of
from millrace.core.replay.ledger_file import LIVE
from millrace.core.replay.ledger_rows import LedgerRows, add, of_records
from millrace.core.replay.segments import Place, Segments
from millrace.core.replay.syncer import Syncer

_AT_ONCE = 256  # packs whose facts an export reads at a time
_FOLD_AT = 4096  # facts that are moved to their tables together


class DiskJournal:
    """Survives a kill of its process: implements `Journal`."""

    def __init__(self, directory: str | Path, config: JournalConfig) -> None:
        """Args: the run directory. Nothing is opened before `records`, so that it can go to another process."""
        self._directory = Path(directory)
        self._path = self._directory / ledger_file.NAME
        self._config = config
        self._connection: sqlite3.Connection | None = None
        self.damage: list[str] = []

    # -- records

    def records(self) -> Iterator[Record]:
        """Open the files, repair what a crash left, and give every record.

        Raises:
            LedgerError: another process has them open, or a newer version of millrace wrote them.
            ConfigError: they are on a network file system.
            JournalError: the ledger is damaged, or the disk is full.
        """
        self.close()
        self._lock = RLock()
        self._connection = ledger_file.opened(self._directory)
        try:
            records = self._read_records()
            self._open_segments()
        except BaseException:
            self._connection.close()
            self._connection = None
            raise
        return iter(records)

    def _read_records(self) -> list[Record]:
        self._pending = LedgerRows()
        self._commits = False  # one of the records that are pending is a commit
        with ledger_file.in_words(self._path):
            records = list(self._pending.read(self._open()))
        self._fold()
        self._behind = len(records)
        return records

    def _open_segments(self) -> None:
        folder = self._directory / segments.FOLDER
        self._places: dict[int, Place] = {}
        self._rows: dict[int, set[int]] = {}
        self._needed: Counter[int] = Counter()  # segment that may go -> rows of it that are still needed
        self._cache: OrderedDict[int, schema.Pack] = OrderedDict()
        self._cached_bytes = 0
        with ledger_file.in_words(self._path):
            (last,) = self._sql("select coalesce(max(segment), -1) from packs").fetchone()
            (given,) = self._sql(
                "select max(cast(value as int), (select coalesce(max(pack), 0) from packs)) "
                "from meta where key = 'packs'"
            ).fetchone()
            self._next = given + 1
            for pack, segment, offset, length, crc32, rows, kept in self._sql(LIVE):
                self._places[pack] = Place(segment, offset, length, crc32)
                over = {row for (row,) in self._sql("select row from outcomes where pack = ?", pack)}
                self._rows[pack] = set(range(rows)) - over
                if not kept:
                    self._needed[segment] += len(self._rows[pack])
        try:
            folder.mkdir(exist_ok=True)
            self._segments = Segments(folder, first=1 + max(last, *Segments(folder, first=0).numbers(), -1))
            self._repair()
        except OSError as caught:
            raise ledger_file.unwritable(folder, caught, len(segments.HEAD)) from caught
        self._syncer = Syncer(self._path, self._segments, self._config.fsync_s, self.damage)
        weakref.finalize(self, self._syncer.stop)

    def _repair(self) -> None:
        """Seal what an earlier life left open, free what nobody needs, and say what is missing."""
        there = self._segments.numbers()
        with ledger_file.in_words(self._path):
            known = dict(self._sql("select segment, max(kept) from packs group by segment order by segment"))
        # Segments that nobody needs, until their rows are gone too.
        self._gone = [number for number, kept in known.items() if not kept and not self._needed[number]]
        for number in sorted(known.keys() - there.keys() - set(self._gone)):
            self.damage.append(f"{self._segments.path(number)} is gone; what was needed of it is drawn again")
        for number, path in there.items():
            if number in self._gone:
                continue
            if number not in known and not path.name.startswith("_"):
                self.damage.append(f"{path} holds rollouts that {self._path} does not know")
            elif not segments.sealed(path) and (why := segments.seal(path, self._in_segment(number))):
                self.damage.append(f"{path} cannot be made an Arrow file: {why}; what can be read of it is used")

    def _in_segment(self, number: int) -> list[Place]:
        select = "select segment, offset, length, crc32 from packs where segment = ?"
        with ledger_file.in_words(self._path):
            return [Place(*row) for row in self._sql(select, number)]

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            raise JournalError(f"the journal of {self._directory} is not open: its run has ended")
        return self._connection

    def _sql(self, statement: str, *values: object) -> sqlite3.Cursor:
        return self._open().execute(statement, values)

    @property
    def behind(self) -> int:
        return self._behind

    def append(self, record: Record) -> None:
        self._pending.record(record)
        self._commits |= record["op"] == "committed"
        self._behind += 1

    def flush(self) -> None:
        """Return when everything appended and stored so far would survive a kill of this process.

        Raises:
            JournalError: it cannot be written now. All of it is kept for the next flush.
        """
        if not (self._pending.pending or self._gone):
            return
        reach("journal.flush.before")
        if self._pending.pending:
            self._write_row(self._pending.text())
        if self._commits:  # who hears of it deletes the checkpoint before: no loss of power may undo it
            self._syncer.write_log()
            self._commits = False
        reach("journal.flush.after")
        if self._pending.to_fold >= _FOLD_AT:
            with suppress(JournalError):  # they stay in their rows, and the next flush moves them
                self._fold()
        if self._gone:
            self._delete_segments()
        self._syncer.dirty()

    def _write_row(self, text: str) -> None:
        with self._lock:
            try:
                add(self._open(), text)
            except sqlite3.Error as caught:
                raise ledger_file.in_words_of(self._path, caught, len(text)) from caught
            self._pending.flushed()

    def _fold(self) -> None:
        """Move the facts of all rows to their tables."""
        with self._lock:
            if self._pending.to_fold:
                self._transaction(self._pending.fold, bytes_needed=256 * self._pending.to_fold)
                self._pending.folded()

    def _delete_segments(self) -> None:
        """Their files, then their rows, which say until then that nobody needs them."""
        gone = [number for number in self._gone if self._syncer.remove(self._segments.path(number))]

        def forget(connection: sqlite3.Connection) -> None:  # no number of theirs is given out again
            self._pending.fold(connection)
            connection.execute("update meta set value = ? where key = 'packs'", (str(self._next - 1),))
            connection.executemany("delete from packs where segment = ?", [(number,) for number in gone])

        with suppress(JournalError), self._lock:  # the next flush, or the next opening, does it
            self._transaction(forget, bytes_needed=4096)
            self._pending.folded()
            self._gone = [number for number in self._gone if number not in gone]

    def compact(self, image: Record) -> None:
        """Replace all records by one that stands for them all. Whole or not at all after a crash."""
        self.flush()
        text = of_records(text_of(image))

        def replace(connection: sqlite3.Connection) -> None:
            connection.execute("delete from records")
            add(connection, text)
            self._pending.fold(connection)
            reach("journal.compact")

        with self._lock:  # an export may fold at the same time
            self._transaction(replace, bytes_needed=len(text))
            self._pending.folded()
        self._behind = 1

    def _transaction(self, write: Any, *, bytes_needed: int) -> None:
        """All of it or nothing."""
        with self._lock, ledger_file.in_words(self._path, bytes_needed=bytes_needed):
            connection = self._open()
            connection.execute("begin immediate")
            try:
                write(connection)
                connection.execute("commit")
            finally:
                if connection.in_transaction:
                    connection.execute("rollback")

    # -- payloads

    def store(self, pack: schema.Pack, rows: Sequence[int], *, of: int) -> list[Location]:
        """Keep these of a pack's `of` rows; one location for each.

        Raises:
            JournalError: they cannot be written now; nothing is kept of them.
        """
        if not rows:
            return []
        reach("journal.store.before")
        self._rotate()
        parts = self._parts(pack, rows, of)
        messages = [(kept, memoryview(part).cast("B")[len(schema.MARK) :]) for kept, part, _ in parts]
        try:
            places = self._segments.append(messages)
        except OSError as caught:
            raise ledger_file.unwritable(self._segments.folder, caught, len(pack)) from caught
        reach("journal.store.after")
        found: dict[int, Location] = {}
        for (kept, part, own), place in zip(parts, places, strict=True):
            number = self._next
            self._next += 1
            self._pending.pack(number, *place, len(own), int(kept))
            self._places[number] = place
            self._rows[number] = set(range(len(own)))
            if not kept:
                self._needed[place.segment] += len(own)
            self._remember(number, part)
            found |= {row: (number, at) for at, row in enumerate(own)}
        return [found[row] for row in rows]

    def _parts(self, pack: schema.Pack, rows: Sequence[int], of: int) -> list[tuple[bool, schema.Pack, Sequence[int]]]:
        """What stays and what may go, each as a pack of its own; the pack itself where that is all of it."""
        kinds: list[tuple[bool, Sequence[int]]] = [(self._config.keep_rollouts == "all", rows)]
        if self._config.keep_rollouts == "sample":
            draws, every = schema.read(pack).column("draw").to_pylist(), self._config.sample_every
            kinds = [(kept, [row for row in rows if (draws[row] % every == 0) == kept]) for kept in (True, False)]
        return [
            (kept, pack if list(own) == list(range(of)) else schema.select([(pack, row) for row in own]), own)
            for kept, own in kinds
            if own
        ]

    def _rotate(self) -> None:
        for kept in self._segments.full(self._config.segment_bytes):
            self.flush()
            self._fold()  # the thread that seals it knows its packs from the table
            self._close_segment(kept)

    def _close_segment(self, kept: bool) -> None:
        segment = self._segments.close(kept)
        if not kept and not self._needed[segment.number]:
            self._gone.append(segment.number)
        else:
            self._syncer.seal(segment.path, self._in_segment(segment.number))

    def load(self, location: Location) -> tuple[schema.Pack, int]:
        """The pack that holds the row, and its number in it.

        Raises:
            PayloadError: it is gone or damaged.
        """
        number, row = location
        if row not in self._rows.get(number, ()):
            raise PayloadError(f"row {row} of pack {number} is not in {self._segments.folder}")
        pack = self._cache.get(number)
        if pack is None:
            try:
                pack = self._segments.read(self._places[number])
            except (OSError, ValueError) as caught:
                segment = self._places[number].segment
                what = f"{self._segments.path(segment)} does not give pack {number} back: {caught}"
                self.damage.append(f"{what}; its groups are drawn again")
                self._segments.leave(segment)
                del self._rows[number]
                raise PayloadError(self.damage[-1]) from caught
            self._remember(number, pack)
        self._cache.move_to_end(number)
        return pack, row

    def _remember(self, number: int, pack: schema.Pack) -> None:
        self._cache[number] = pack
        self._cached_bytes += len(pack)
        while self._cached_bytes > self._config.cache_bytes and len(self._cache) > 1:
            self._cached_bytes -= len(self._cache.popitem(last=False)[1])

    def holds(self, location: Location) -> bool:
        """Whether the row is there and whole: it was stored, survived, and was not forgotten."""
        with suppress(PayloadError):
            self.load(location)
            return True
        return False

    def forget(self, outcome: Outcome) -> None:
        """The group's payload is needed no more; its facts are written with the next flush."""
        (number, row), place = outcome.location, self._places.get(outcome.location[0])
        self._pending.outcome(outcome)
        rows = self._rows.get(number)
        if rows is None or place is None or row not in rows:
            return
        rows.remove(row)
        if place.segment in self._needed:
            self._needed[place.segment] -= 1
            self._free(place.segment)
        if not rows:
            del self._rows[number], self._places[number]
            if number in self._cache:
                self._cached_bytes -= len(self._cache.pop(number))

    def _free(self, number: int) -> None:
        """A segment goes, with the next flush, when nobody needs a row of it and none is written to it."""
        if not self._needed[number] and number not in {each.number for each in self._segments.open.values()}:
            del self._needed[number]
            self._gone.append(number)

    # -- the end

    def export(self, live: Sequence[Outcome]) -> int:
        """Write every rollout that is kept to `rollouts.parquet`. Returns its rows.

        Args:
            live: the groups whose fate is not final.
        Raises:
            JournalError: the disk is full, or the ledger is damaged.
        """
        path = self._directory / rollouts.NAME
        self._fold()
        try:
            return rollouts.write(path, self._packs(live))
        except OSError as caught:
            raise ledger_file.unwritable(path, caught, self._segments.bytes) from caught

    def _packs(self, live: Sequence[Outcome]) -> Iterator[tuple[schema.Pack, list[Outcome]]]:
        """Every pack that can be read, with the fates of its groups, in the order they were written."""
        alive: dict[int, list[Outcome]] = {}
        for outcome in live:
            alive.setdefault(outcome.location[0], []).append(outcome)
        last = -1
        while True:
            with self._lock, ledger_file.in_words(self._path):
                page = ledger_rows.page(self._open(), after=last, most=_AT_ONCE)
                over = ledger_rows.outcomes(self._open(), min(page), max(page)) if page else {}
            if not page:
                return
            places, last = {number: Place(*place) for number, place in page.items()}, max(page)
            for number, place in places.items():
                final = over.get(number, [])  # of a group that was alive, it may be since then
                known = {outcome.location for outcome in final}
                outcomes = final + [each for each in alive.get(number, []) if each.location not in known]
                if not outcomes:
                    continue
                try:
                    pack = self._segments.read(place)
                except (OSError, ValueError) as caught:
                    self.damage.append(f"{self._segments.path(place.segment)}: pack {number} is left out: {caught}")
                    continue
                yield pack, outcomes

    def close(self) -> None:
        """Write what is pending, seal the segments, and let another process open the files.

        Raises:
            JournalError: the disk is full. It is closed all the same; what was accepted before stays.
        """
        if self._connection is None:
            return
        try:
            self.flush()
            self._fold()
            for kept in self._segments.open:
                self._close_segment(kept)
            self.flush()
            self._syncer.stop()
            self.flush()  # what was being sealed can be deleted now
        finally:
            self._syncer.stop()
            with ledger_file.in_words(self._path):
                self._connection.close()
            self._connection = None
