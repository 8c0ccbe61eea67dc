"""Ledgers of older schema versions go on; newer and damaged ones are refused."""

import asyncio
import json
import sqlite3
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from millrace.core.errors import JournalError, LedgerError
from millrace.core.replay.disk import DiskJournal
from millrace.core.replay.journal import JournalConfig
from tests.core.replay.life import Life


def opened(folder: Path) -> list[dict]:
    """The records of a journal, closed again."""
    with closing(DiskJournal(folder, JournalConfig())) as journal:
        return list(journal.records())


@contextmanager
def ledger(folder: Path) -> Iterator[sqlite3.Connection]:
    """Its file, to be changed."""
    with closing(sqlite3.connect(folder / "ledger.sqlite")) as file, file:
        yield file


async def half_a_run(folder: Path) -> tuple[Life, list[str]]:
    """A step committed, the next one's groups generated; then closed. Returns its records, too."""
    life = Life(folder)
    await life.begin()
    await life.one_step()
    await life.commit()
    await life.generate()
    await life.queue.close()
    return life, [json.dumps(record) for record in opened(folder)]


async def the_rest(life: Life) -> dict[str, int]:
    """Its steps, and what became of its tokens."""
    while life.step < 4:
        await life.one_step()
    await life.commit()
    status = await life.queue.status()
    await life.queue.close()
    assert status.states["committed"] == 8 and status.tokens["unaccounted"] == 0
    return dict(status.tokens)


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    opened(tmp_path)
    with ledger(tmp_path) as file:
        file.execute("update meta set value = '99' where key = 'version'")
    with pytest.raises(LedgerError, match="schema version 99, and this millrace knows up to"):
        opened(tmp_path)


def test_a_run_of_version_1_goes_on(tmp_path: Path) -> None:
    """A row for each record, every fact in its table: nothing is drawn again."""

    async def main() -> None:
        old, records = await half_a_run(tmp_path)
        with ledger(tmp_path) as file:
            file.execute("delete from records")
            rows = [(text, zlib.crc32(text.encode())) for text in records]
            file.executemany("insert into records (record, crc32) values (?, ?)", rows)
            file.execute("delete from meta where key = 'folded'")
            file.execute("update meta set value = '1' where key = 'version'")
        new = Life(tmp_path)
        new.generated = old.generated
        await new.begin()
        assert "failed:lost" not in await the_rest(new) and not new.journal.damage

    asyncio.run(main())


def test_a_damaged_row_of_version_1_is_named(tmp_path: Path) -> None:
    opened(tmp_path)
    with ledger(tmp_path) as file:
        file.execute('insert into records (record, crc32) values (\'{"op":"x"}\', 7)')
        file.execute("update meta set value = '1' where key = 'version'")
    with pytest.raises(JournalError, match=r"ledger\.sqlite is damaged: record 1 has another checksum"):
        opened(tmp_path)


def test_a_run_of_version_0_goes_on(tmp_path: Path) -> None:
    """Lines of JSON and no payloads, the last line torn: what was committed stays, the rest is drawn again."""

    async def main() -> None:
        _, records = await half_a_run(tmp_path / "other")
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "ledger.jsonl").write_text("\n".join([*records, '{"op":"comm']))
        new = Life(tmp_path / "run")
        await new.begin()
        assert (new.resumption.step, new.resumption.directory) == (1, "step_1")
        assert (await the_rest(new))["failed:lost"] > 0
        with ledger(tmp_path / "run") as file:
            size = sum(len(record) + 1 for record in records)
            assert file.execute("select min(pack) from packs").fetchone()[0] > size
        assert len(opened(tmp_path / "run")) > len(records)

    asyncio.run(main())


def test_a_broken_line_of_version_0_is_named(tmp_path: Path) -> None:
    (tmp_path / "ledger.jsonl").write_text(json.dumps({"op": "x"}) + '\n{"op": "y"\n{}\n')
    with pytest.raises(JournalError, match=r"ledger\.jsonl.*line 2"):
        opened(tmp_path)
    assert not (tmp_path / "ledger.holder").exists()
