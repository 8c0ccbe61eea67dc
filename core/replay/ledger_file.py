"""The SQLite file of the ledger: opened by one process alone, checked, migrated, and its failures put in words."""

import json
import os
import shutil
import socket
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from isal import isal_zlib

from millrace.core.errors import ConfigError, JournalError, JournalFullError, LedgerError, MillraceError
from millrace.core.replay import ledger_rows

NAME, HOLDER, LINES = "ledger.sqlite", "ledger.holder", "ledger.jsonl"
VERSION = 2

_TABLES = """
create table meta (key text primary key, value text not null) without rowid;
insert into meta values ('packs', '0');
create table records (number integer primary key, record text not null, crc32 integer not null);
create table packs (
    pack integer primary key, segment integer not null, offset integer not null, length integer not null,
    crc32 integer not null, rows integer not null, kept integer not null
);
create table outcomes (
    pack integer not null, row integer not null, draw integer not null, attempt integer not null, state text not null,
    steps text not null, rule text not null, verdicts text not null, lags text not null, primary key (pack, row)
) without rowid;
"""

LIVE = """
select pack, segment, offset, length, crc32, rows, kept from packs
where rows > (select count(*) from outcomes where outcomes.pack = packs.pack)
"""

_DYING_S = 2.0  # how long whoever holds the file may still take: a process that was killed a moment ago ends soon
_LOG_PAGES = 8192  # 32 MiB: folding the log into the file waits for the disk, so it is done rarely
_REMOTE = {"nfs", "nfs4", "cifs", "smb3", "smbfs", "ncpfs", "9p", "afs", "ceph", "lustre", "gpfs", "beegfs", "pvfs2"}
_LOCAL_FUSE = {"fuse.fuse-overlayfs"}
_FULL = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR}
_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}


def opened(directory: Path) -> sqlite3.Connection:
    """The ledger's file, for this process alone.

    Raises:
        ConfigError: the directory is on a network file system.
        LedgerError: another process has it open, or a newer version of millrace wrote it.
        JournalError: it is damaged, gone, or cannot be written.
    """
    refuse_network(directory)
    path = directory / NAME
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _refuse_lost(directory)
    except OSError as caught:
        raise unwritable(path, caught, 0) from caught
    with in_words(path):
        connection = sqlite3.connect(path, timeout=_DYING_S, isolation_level=None, check_same_thread=False)
    try:
        with in_words(path):
            _begin(connection, directory)
    except MillraceError:
        connection.close()
        raise
    return connection


def _begin(connection: sqlite3.Connection, directory: Path) -> None:
    connection.execute("pragma locking_mode = exclusive")
    connection.execute("pragma journal_mode = wal")
    connection.execute("pragma synchronous = normal")
    connection.execute(f"pragma wal_autocheckpoint = {_LOG_PAGES}")
    connection.execute("begin immediate")
    try:
        _migrate(connection, directory)
        connection.execute("commit")
    finally:
        if connection.in_transaction:
            connection.execute("rollback")
    found = [row[0] for row in connection.execute("pragma quick_check(3)")]
    if found != ["ok"]:
        raise damaged(directory / NAME, " ".join("; ".join(found).split()))
    try:
        _name_holder(directory)
    except OSError as caught:
        raise unwritable(directory / HOLDER, caught, 256) from caught


def _migrate(connection: sqlite3.Connection, directory: Path) -> None:
    """Make the tables, or bring those of an older version up to this one, in the caller's transaction."""
    fresh = not connection.execute("select count(*) from sqlite_master").fetchone()[0]
    if fresh:
        for statement in _TABLES.split(";"):
            connection.execute(statement)
        version = 0 if (directory / LINES).exists() else VERSION
        connection.execute("insert into meta values ('version', ?)", (str(version),))
    version = int(connection.execute("select value from meta where key = 'version'").fetchone()[0])
    if version > VERSION:
        raise LedgerError(
            f"{directory / NAME} has schema version {version}, and this millrace knows up to {VERSION}: a newer one "
            "wrote it. Resume the run with that version"
        )
    for old in range(version, VERSION):
        migrations[old](connection, directory)
    connection.execute("update meta set value = ? where key = 'version'", (str(VERSION),))


def _take_lines(connection: sqlite3.Connection, directory: Path) -> None:
    """Version 0 kept its records as lines of JSON, and no payload: what was not committed is drawn again."""
    path = directory / LINES
    whole = b"".join(path.read_bytes().rpartition(b"\n")[:2])
    texts = whole.decode(errors="replace").splitlines()
    for number, text in enumerate(texts, 1):
        try:
            json.loads(text)
        except ValueError as caught:
            raise damaged(path, f"line {number} is no JSON ({caught})") from caught
    for text in texts:
        ledger_rows.add(connection, text)
    # Each pack of that life has a record longer than one byte, so no number of it is given out again.
    connection.execute("update meta set value = ? where key = 'packs'", (str(len(whole)),))


def _one_row_per_flush(connection: sqlite3.Connection, directory: Path) -> None:
    """Version 1 had a row for each record, and its facts in their tables with every flush."""
    rows = connection.execute("select number, record, crc32 from records").fetchall()
    for number, text, crc32 in rows:
        if isal_zlib.crc32(text.encode()) != crc32:
            raise damaged(directory / NAME, f"record {number} has another checksum than when it was written")
        row = ledger_rows.of_records(text)
        values = (row, isal_zlib.crc32(row.encode()), number)
        connection.execute("update records set record = ?, crc32 = ? where number = ?", values)
    connection.execute(ledger_rows.FOLDED)


# From a version to the next.
migrations: dict[int, Callable[[sqlite3.Connection, Path], None]] = {0: _take_lines, 1: _one_row_per_flush}


def _refuse_lost(directory: Path) -> None:
    """A file that was there and is gone, or empty, must not look like a run that has not begun."""
    path = directory / NAME
    if (directory / HOLDER).exists() and (not path.exists() or not path.stat().st_size):
        raise damaged(path, "it is empty" if path.exists() else "it is gone")


def _name_holder(directory: Path) -> None:
    """For the message to whoever comes second."""
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    part = directory / f"{HOLDER}.part"
    part.write_text(json.dumps(holder) + "\n")
    part.replace(directory / HOLDER)


def _held(directory: Path) -> LedgerError:
    try:
        holder = json.loads((directory / HOLDER).read_text())
        who = f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        who = "another process"
    return LedgerError(
        f"{directory / NAME} is held by {who}: a run has one queue, which alone writes its ledger. "
        "End that run first (millrace stop), or give this one a name of its own"
    )


# -- failures in words


@contextmanager
def in_words(path: Path, *, bytes_needed: int = 4096) -> Iterator[None]:
    """Say of SQLite's errors which file they are about, and what to do."""
    try:
        yield
    except sqlite3.Error as caught:
        raise in_words_of(path, caught, bytes_needed) from caught


def in_words_of(path: Path, caught: sqlite3.Error, bytes_needed: int) -> MillraceError:
    """What to raise in its place."""
    code = getattr(caught, "sqlite_errorcode", 0) & 0xFF
    if code == sqlite3.SQLITE_BUSY:
        return _held(path.parent)
    if code in _DAMAGED:
        return damaged(path, str(caught))
    if code in _FULL or isinstance(caught, sqlite3.OperationalError):
        return unwritable(path, caught, bytes_needed)
    return damaged(path, f"{type(caught).__name__}: {caught}")


def damaged(path: Path, why: str) -> JournalError:
    """A ledger that cannot be trusted is not continued from."""
    return JournalError(
        f"{path} is damaged: {why}. The checkpoints beside it are not touched by this: restore the file from a copy "
        f'and resume, or begin a new run from one of them (model = "{path.parent / "checkpoints"}/step_N")'
    )


def unwritable(path: Path, caught: Exception, bytes_needed: int) -> JournalFullError:
    """Names the bytes that are needed and those that are free."""
    try:
        free = f"{shutil.disk_usage(path.parent).free} are free"
    except OSError as other:
        free = f"the free space is unknown ({other})"
    return JournalFullError(
        f"{path} cannot be written: {caught}. About {bytes_needed} bytes are needed, {free} in {path.parent}. Nothing "
        "that was accepted is lost: make room on that disk, and the call succeeds when it is repeated"
    )


# -- where it may lie


def refuse_network(directory: Path, mounts: str | None = None) -> None:
    """Locks and the order of writes are the local disk's promise alone.

    Raises:
        ConfigError: the directory is on a network file system.
    """
    if mounts is None:
        table = Path("/proc/mounts")
        mounts = table.read_text() if table.exists() else ""
    kind, point = filesystem(directory, mounts)
    if kind in _REMOTE or (kind.startswith("fuse.") and kind not in _LOCAL_FUSE):
        raise ConfigError(
            f"the run directory {directory} is on a network file system ({kind}, mounted at {point}), on which a "
            "ledger can be lost or written by two processes: give a directory on a local disk, or set "
            "journal.on_disk = false and lose the run's present when its queue is killed"
        )


def filesystem(directory: Path, mounts: str) -> tuple[str, str]:
    """Type and mount point of what holds the directory, by a table like /proc/mounts.

    >>> filesystem(Path("/data/runs"), "/dev/sda / ext4 rw 0 0\\nhost:/x /data nfs4 rw 0 0\\n")
    ('nfs4', '/data')
    """
    real, best = directory.resolve(), ("", "")
    for line in mounts.splitlines():
        _, point, kind, *_ = [*line.split(), "", "", ""]
        point = point.encode().decode("unicode_escape")  # a space is written \040
        if point and real.is_relative_to(point) and len(point) >= len(best[1]):
            best = (kind, point)
    return best
