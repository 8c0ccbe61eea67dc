"""What a full disk, torn writes, rot and missing files leave: everything that was accepted, or a clear word."""

import asyncio
import errno
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from millrace.core import schema
from millrace.core.errors import Fenced, JournalError
from millrace.core.replay import segments
from millrace.core.replay.disk import DiskJournal
from tests.core.replay.life import TOKENS, Life, a_life_until_the_kill, as_killed
from tests.core.replay.test_disk import draws_of, journal, pack_of, readable


async def to_the_end(life: Life) -> None:
    await life.begin()
    while life.step < 4:
        await life.one_step()
    await life.commit()
    status = await life.queue.status()
    assert status.states["committed"] == 8 and status.tokens["trained"] == 8 * 2 * TOKENS
    assert status.tokens["unaccounted"] == 0


# -- a full disk


def full_after(monkeypatch: pytest.MonkeyPatch, room: int) -> Callable[[], None]:
    """The disk takes so many bytes more: a short write, then none. The returned call makes room."""
    real, left = os.pwrite, [room]

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        done = real(fd, data[: left[0]], offset)
        left[0] -= done
        return done

    monkeypatch.setattr(segments.os, "pwrite", pwrite)
    return lambda: monkeypatch.setattr(segments.os, "pwrite", real)


@pytest.mark.parametrize("room", [0, 3, 900, 1500])
def test_a_payload_that_finds_no_room_leaves_nothing_and_is_taken_when_there_is_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    own = journal(tmp_path)
    (first,) = own.store(pack_of(1), [0], of=1)
    make_room = full_after(monkeypatch, room)
    with pytest.raises(JournalError, match=r"rollouts cannot be written: .*No space left.* bytes are needed, \d+ are"):
        for _ in range(2):
            own.store(pack_of(2, 3), [0, 1], of=2)
    own.append({"op": "x"})
    own.flush()
    make_room()
    later = own.store(pack_of(2, 3), [0, 1], of=2)
    own.flush()
    copy = journal(as_killed(tmp_path), cache_bytes=0)
    assert draws_of(copy, [first, *later])[-2:] == [2, 3] and not copy.damage
    copy.close()
    assert readable(copy)[-2:] == [2, 3]


def test_a_pack_that_is_split_over_two_files_is_in_both_or_in_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = journal(tmp_path, keep_rollouts="sample", sample_every=2)
    first = own.store(pack_of(0, 1), [0, 1], of=2)
    size = len(pack_of(2)) - 8
    make_room = full_after(monkeypatch, size + size // 2)
    with pytest.raises(JournalError):
        own.store(pack_of(2, 3), [0, 1], of=2)
    make_room()
    later = own.store(pack_of(4, 5), [0, 1], of=2)
    own.flush()
    own.close()
    assert sorted(readable(own)) == [0, 1, 4, 5]
    assert draws_of(journal(tmp_path, cache_bytes=0), first + later) == [0, 1, 4, 5]


def test_a_first_payload_that_finds_no_room_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = journal(tmp_path)
    make_room = full_after(monkeypatch, 40)
    with pytest.raises(JournalError):
        own.store(pack_of(1), [0], of=1)
    assert not list((tmp_path / "rollouts").iterdir())
    make_room()
    assert draws_of(own, own.store(pack_of(1), [0], of=1)) == [1]


def test_a_segment_that_cannot_be_cut_is_given_up_and_repaired_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(fd: int, end: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    own = journal(tmp_path)
    first = own.store(pack_of(1), [0], of=1)
    with monkeypatch.context() as patch:
        make_room = full_after(patch, 100)
        patch.setattr(segments.os, "ftruncate", broken)
        with pytest.raises(JournalError):
            own.store(pack_of(2), [0], of=1)
        make_room()
    second = own.store(pack_of(3), [0], of=1)
    own.flush()
    other = journal(as_killed(tmp_path), cache_bytes=0)
    assert draws_of(other, first + second) == [1, 3] and not other.damage
    assert readable(other) == [1, 3]


def test_records_that_find_no_room_are_written_by_a_later_flush(tmp_path: Path) -> None:
    own = journal(tmp_path)
    own.append({"op": "first"})
    own.flush()
    (pages,) = own._connection.execute("pragma page_count").fetchone()
    own._connection.execute(f"pragma max_page_count = {pages}")
    for number in range(40):
        own.append({"op": "x" * 400, "number": number})
    for _ in range(2):
        with pytest.raises(JournalError, match=r"ledger\.sqlite cannot be written: .*full.* About \d{5} bytes are"):
            own.flush()
    own.append({"op": "last"})
    assert [record["op"] for record in journal(as_killed(tmp_path)).before] == ["first"]
    own._connection.execute("pragma max_page_count = 1000000")
    own.flush()
    shutil.rmtree(tmp_path.with_name(f"{tmp_path.name}-after"))
    after = journal(as_killed(tmp_path)).before
    assert [record.get("number") for record in after[1:-1]] == list(range(40)) and after[-1] == {"op": "last"}


def test_a_run_goes_on_when_there_is_room_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        life = Life(tmp_path / "run")
        await life.begin()
        make_room = full_after(monkeypatch, 0)
        grant = await life.queue.lease_draws(
            "generation-0", epoch=life.engine, version=0, want=2, request="a", wait_s=0
        )
        pack = schema.encode([life.group(lease) for lease in grant.leases])
        for _ in range(2):
            with pytest.raises(JournalError, match="make room on that disk"):
                await life.queue.put_groups("generation-0", epoch=life.engine, pack=pack, request="b")
        make_room()
        receipts = await life.queue.put_groups("generation-0", epoch=life.engine, pack=pack, request="b")
        assert all(receipt.accepted for receipt in receipts)
        await life.score()
        await life.learn()
        await life.commit()
        await life.queue.close()
        await to_the_end(Life(tmp_path / "run"))

    asyncio.run(main())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte."""
    point = tmp_path / "disk"
    point.mkdir()
    call = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(point)]
    if os.geteuid() or subprocess.run(call, capture_output=True, timeout=20).returncode:
        pytest.skip("only root can make a small disk here")
    try:
        yield point
    finally:
        subprocess.run(["umount", "-l", str(point)], check=True, timeout=20)


@pytest.mark.parametrize("filler", ["payloads", "records"])
def test_a_really_full_disk(small_disk: Path, filler: str) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * (300 << 10))
    own, kept, written = journal(small_disk / "run"), [], 0
    with pytest.raises(JournalError, match=r"cannot be written.*\d+ are free in .*make room") as caught:
        for number in range(3000):
            if filler == "payloads":
                (location,) = own.store(pack_of(number, tokens=500), [0], of=1)
                kept.append(location)
            own.append({"op": "x" * (1 if filler == "payloads" else 3000), "number": number})
            own.flush()
            written = number + 1
    assert written > 20 and str(small_disk) in str(caught.value)
    held = draws_of(own, kept[:written])
    ballast.unlink()
    own.flush()
    own.close()
    other = journal(small_disk / "run", cache_bytes=0)
    assert [record["number"] for record in other.before][:written] == list(range(written)) and not other.damage
    assert draws_of(other, kept[:written]) == held
    assert readable(other)[:written] == held
    other.close()


# -- rot, and files that are gone


def segment(folder: Path) -> Path:
    (path,) = (folder / "rollouts").glob("*.arrow")
    return path


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0xFF
    path.write_bytes(bytes(data))


def test_a_torn_tail_is_cut_off(tmp_path: Path) -> None:
    own = journal(tmp_path)
    first = own.store(pack_of(1), [0], of=1)
    own.flush()
    copy = as_killed(tmp_path)
    with segment(copy).open("ab") as file:
        file.write(pack_of(2)[8:300])
    other = journal(copy, cache_bytes=0)
    assert draws_of(other, first) == [1] and not other.damage and readable(other) == [1]


DAMAGE: dict[str, Callable[[Path], None]] = {
    "a flipped byte of a payload": lambda path: flip(path, len(segments.HEAD) + 900),
    "a flipped byte near the end": lambda path: flip(path, path.stat().st_size - 50),
    "a flipped byte of a message's head": lambda path: flip(path, len(segments.HEAD) + 2),
    "a flipped byte of the file's head": lambda path: flip(path, 20),
    "a file without its end": lambda path: os.truncate(path, path.stat().st_size - 100),
    "a very short file": lambda path: os.truncate(path, 10),
    "an empty file": lambda path: os.truncate(path, 0),
    "no file": lambda path: path.unlink(),
}


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_payloads_are_drawn_again_and_said(tmp_path: Path, what: str, sealed: bool) -> None:
    async def main() -> None:
        life = await a_life_until_the_kill(tmp_path / "run")
        if sealed:
            await life.queue.close()
        copy = as_killed(tmp_path / "run")
        path = segment(copy)
        DAMAGE[what](path)
        second = Life(copy)
        await to_the_end(second)
        status = await second.queue.status()
        said = await second.queue.damage()
        if "file's head" in what or (sealed and "end" in what):  # no payload is touched
            assert not status.tokens.get("failed:lost") and all("drawn again" not in line for line in said)
        else:
            assert status.tokens["failed:lost"] > 0
            assert any("drawn again" in line and re.search(r"\d{6}\.arrow", line) for line in said), said
        assert said or sealed
        await second.queue.export()
        await second.queue.close()

    asyncio.run(main())


def test_a_payload_that_rots_during_the_run_is_drawn_again_without_an_end(tmp_path: Path) -> None:
    async def main() -> None:
        life = Life(tmp_path / "run", cache_bytes=0)
        await life.begin()
        await life.generate()
        await life.score()
        life.journal._cache.clear()
        flip(segment(tmp_path / "run"), len(segments.HEAD) + 400)
        with pytest.raises(Fenced):
            await life.queue.take(step=0, epoch=life.resumption.epoch, wait_s=0)
        assert "drawn again" in (await life.queue.damage())[0]
        await to_the_end(life)

    asyncio.run(main())


def test_a_judge_gets_the_groups_that_can_still_be_read(tmp_path: Path) -> None:
    async def main() -> None:
        life = Life(tmp_path / "run", cache_bytes=0)
        await life.begin()
        await life.generate()
        life.journal._cache.clear()
        segment(tmp_path / "run").unlink()
        await life.score()
        assert (await life.queue.status()).tokens["failed:lost"] == 4 * 2 * TOKENS
        await to_the_end(life)

    asyncio.run(main())


def ledger(folder: Path) -> Path:
    return folder / "ledger.sqlite"


def closed_life(folder: Path) -> Path:
    async def main() -> None:
        life = await a_life_until_the_kill(folder)
        await life.queue.close()

    asyncio.run(main())
    return folder


def replace(path: Path, old: bytes, new: bytes) -> None:
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, 1))


LEDGERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (lambda path: os.truncate(path, path.stat().st_size // 2), "malformed|page|short"),
    "cut to its first page": (lambda path: os.truncate(path, 4096), "malformed|page|short"),
    "empty": (lambda path: os.truncate(path, 0), "it is empty"),
    "gone": (lambda path: path.unlink(), "it is gone"),
    "another file": (lambda path: path.write_bytes(b"not a database, only text\n" * 400), "not a database"),
    "rot in a record": (lambda path: replace(path, b'"joined"', b'"jolned"'), "checksum"),
    "rot in its tree": (lambda path: flip(path, 4096 + 1), "malformed|Tree|page|cell|corrupt"),
}


@pytest.mark.parametrize("what", LEDGERS)
def test_a_damaged_ledger_is_refused_with_its_name_and_the_way_out(tmp_path: Path, what: str) -> None:
    folder = closed_life(tmp_path / "run")
    damage, why = LEDGERS[what]
    damage(ledger(folder))
    for _ in range(2):
        with pytest.raises(JournalError, match=f"(?i){ledger(folder)} is damaged: .*({why}).*checkpoints") as caught:
            Life(folder)
    assert len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.99])
def test_a_cut_write_ahead_log_goes_back_in_time_and_stays_whole(tmp_path: Path, share: float) -> None:
    """As after a loss of power: the newest transactions are gone, and what remains belongs together."""

    async def main() -> None:
        await a_life_until_the_kill(tmp_path / "run")
        copy = as_killed(tmp_path / "run")
        log = copy / "ledger.sqlite-wal"
        os.truncate(log, int(log.stat().st_size * share))
        second = Life(copy)
        await second.begin()
        assert second.resumption.step in (0, 1)
        await to_the_end(second)
        assert not [line for line in await second.queue.damage() if "drawn again" in line]

    asyncio.run(main())


def test_the_log_of_another_life_is_not_mixed_in(tmp_path: Path) -> None:
    folder = closed_life(tmp_path / "run")
    (folder / "ledger.sqlite-wal").write_bytes(os.urandom(40_000))
    asyncio.run(to_the_end(Life(folder)))


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(JournalError, match=str(tmp_path / "file" / "run")):
        journal(tmp_path / "file" / "run")


def test_strange_files_among_the_segments_do_no_harm(tmp_path: Path) -> None:
    own = journal(tmp_path)
    first = own.store(pack_of(1), [0], of=1)
    own.close()
    for name in ("notes.txt", "x.arrow", "_.arrow", "000009.arrow", "_000011.arrow"):
        (tmp_path / "rollouts" / name).write_text("hello")
    other = journal(tmp_path, cache_bytes=0)
    assert draws_of(other, first) == [1]
    assert any("000009.arrow" in line and "does not know" in line for line in other.damage)
    assert draws_of(other, other.store(pack_of(2), [0], of=1)) == [2]
    assert isinstance(other, DiskJournal)
