"""What flushes add to the ledger's file: one row each, whatever it holds.

A row is `{"records": [...], "packs": [...], "outcomes": [...]}`. Where packs lie and what became of groups also has
tables of its own, to which it is moved many rows at a time: a flush that wrote three tables would take five times as
long. Until then it is read from the rows that are not folded.
"""

import json
import sqlite3
from collections.abc import Iterator
from typing import Any

from isal import isal_zlib

from millrace.core.replay.journal import Outcome, Record, text_of

ADD = "insert into records (record, crc32) values (?, ?)"
PACK = "insert into packs values (?, ?, ?, ?, ?, ?, ?)"
OUTCOME = "insert or replace into outcomes values (?, ?, ?, ?, ?, ?, ?, ?, ?)"
FOLDED = "insert or replace into meta select 'folded', coalesce(max(number), 0) from records"

Row = tuple[Any, ...]


class LedgerRows:
    """Rows on their way: those of the next flush, and those whose facts are still to be moved."""

    def __init__(self) -> None:
        self._records: list[str] = []
        self._packs: list[Row] = []
        self._outcomes: list[Row] = []
        self._moving_packs: list[Row] = []
        self._moving_outcomes: list[Row] = []

    def record(self, record: Record) -> None:
        """One more of the next flush, as it is now."""
        self._records.append(text_of(record))

    def pack(self, *row: int) -> None:
        """Number, place, rows, and whether it stays."""
        self._packs.append(row)

    def outcome(self, outcome: Outcome) -> None:
        """What became of a group."""
        self._outcomes.append((*outcome.location, *outcome[1:]))

    @property
    def pending(self) -> bool:
        """Whether a flush has anything to write."""
        return bool(self._records or self._packs or self._outcomes)

    @property
    def to_fold(self) -> int:
        """Facts that are in no table of their own yet."""
        return len(self._moving_packs) + len(self._moving_outcomes)

    def text(self) -> str:
        """The row of the next flush."""
        facts = f',"packs":{text_of(self._packs)},"outcomes":{text_of(self._outcomes)}'
        return f'{{"records":[{",".join(self._records)}]{facts if self._packs or self._outcomes else ""}}}'

    def flushed(self) -> None:
        """The next row has been written."""
        self._moving_packs += self._packs
        self._moving_outcomes += self._outcomes
        for rows in (self._records, self._packs, self._outcomes):
            rows.clear()

    def fold(self, connection: sqlite3.Connection) -> None:
        """Move the facts of written rows to their tables, in the caller's transaction."""
        connection.executemany(PACK, self._moving_packs)
        connection.executemany(OUTCOME, sorted(map(_plain, self._moving_outcomes)))
        connection.execute(FOLDED)

    def folded(self) -> None:
        """That transaction has been committed."""
        self._moving_packs, self._moving_outcomes = [], []

    def read(self, connection: sqlite3.Connection) -> Iterator[Record]:
        """Every record, oldest first. Facts that are not folded yet are to be.

        Raises:
            sqlite3.DatabaseError: a row is not what was written.
        """
        found = connection.execute("select value from meta where key = 'folded'").fetchone()
        folded = int(found[0]) if found else 0
        for number, text, crc32 in connection.execute("select number, record, crc32 from records order by number"):
            if isal_zlib.crc32(text.encode()) != crc32:
                raise sqlite3.DatabaseError(f"row {number} has another checksum than when it was written")
            row = json.loads(text)
            if number > folded:
                self._moving_packs += row.get("packs", ())
                self._moving_outcomes += row.get("outcomes", ())
            yield from row["records"]


def add(connection: sqlite3.Connection, text: str) -> None:
    """Write a row, in the caller's transaction or in one of its own."""
    connection.execute(ADD, (text, isal_zlib.crc32(text.encode())))


def of_records(*texts: str) -> str:
    """The row that holds these records alone.

    >>> of_records('{"op":"announced","version":3}')
    '{"records":[{"op":"announced","version":3}]}'
    """
    return f'{{"records":[{",".join(texts)}]}}'


def page(connection: sqlite3.Connection, *, after: int, most: int) -> dict[int, Row]:
    """Where packs lie, by number: the next ones after this number."""
    select = "select pack, segment, offset, length, crc32 from packs where pack > ? order by pack limit ?"
    return {number: place for number, *place in connection.execute(select, (after, most))}


def outcomes(connection: sqlite3.Connection, first: int, last: int) -> dict[int, list[Outcome]]:
    """What became of the groups in these packs, by pack."""
    select = (
        "select pack, row, draw, attempt, state, steps, rule, verdicts, lags from outcomes "
        "where pack between ? and ? order by pack, row"
    )
    found: dict[int, list[Outcome]] = {}
    for number, row, draw, attempt, state, steps, rule, verdicts, lags in connection.execute(select, (first, last)):
        facts = (draw, attempt, state, tuple(json.loads(steps)), rule, json.loads(verdicts))
        found.setdefault(number, []).append(Outcome((number, row), *facts, tuple(json.loads(lags))))
    return found


def _plain(row: Row) -> Row:
    *place, steps, rule, verdicts, lags = row
    return (*place, text_of(steps), rule, text_of(verdicts), text_of(lags))
