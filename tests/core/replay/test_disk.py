"""The journal on disk: who may open it, what it keeps, and what it lets go."""

import pickle
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from threading import Timer

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pytest

from millrace.core import schema
from millrace.core.errors import ConfigError, JournalError, PayloadError
from millrace.core.replay import ledger_file, syncer
from millrace.core.replay.disk import DiskJournal
from millrace.core.replay.journal import JournalConfig, Outcome
from millrace.core.types import Group, GroupId, Prompt, Rollout, VersionRun
from tests.core.replay.life import as_killed


def pack_of(*draws: int, tokens: int = 4) -> bytes:
    rollout = Rollout(
        tokens_T=np.arange(tokens, dtype=np.int32),
        sampled_T=np.ones(tokens, np.bool_),
        behaviour_logprob_T=np.zeros(tokens, np.float32),
        versions=(VersionRun(0, 0, tokens),),
        finish_reason="stop",
        seed=0,
    )
    prompt = Prompt(id="p", text="", tokens_P=np.zeros(1, np.int32))
    return schema.encode(
        [Group(id=GroupId(draw, 0), prompt=prompt, rollouts=(rollout,) * 2, lease_epoch=1) for draw in draws]
    )


def journal(folder: Path, **config: object) -> DiskJournal:
    own = DiskJournal(folder, JournalConfig.model_validate(config))
    own.before = list(own.records())
    return own


def outcome(location: tuple[int, int], draw: int) -> Outcome:
    return Outcome(location, draw, 0, "committed", (0,), "", None, (0, 0))


def readable(own: DiskJournal) -> list[int]:
    """The draws that an Arrow reader finds in the folder."""
    folder = str(own._directory / "rollouts")
    return pa.dataset.dataset(folder, schema.SCHEMA, format="ipc").to_table()["draw"].to_pylist()


def draws_of(own: DiskJournal, locations: list[tuple[int, int]]) -> list[int]:
    return [group.id.draw for group in schema.decode(schema.select([own.load(each) for each in locations]))]


def test_nothing_is_opened_before_the_records_are_read(tmp_path: Path) -> None:
    own = pickle.loads(pickle.dumps(DiskJournal(tmp_path / "run", JournalConfig())))
    assert not (tmp_path / "run").exists()
    assert list(own.records()) == [] and (tmp_path / "run" / "ledger.sqlite").exists()


def test_records_and_payloads_come_back_in_order(tmp_path: Path) -> None:
    own = journal(tmp_path)
    locations = own.store(pack_of(5, 6), [0, 1], of=2)
    for number in range(3):
        own.append({"op": "x", "number": number, "at": [list(each) for each in locations]})
    own.flush()
    other = journal(as_killed(tmp_path))
    assert [record["number"] for record in other.before] == [0, 1, 2] and other.behind == 3
    assert [tuple(each) for each in other.before[0]["at"]] == locations
    assert draws_of(other, locations) == [5, 6] and not other.damage


def test_what_was_not_flushed_is_not_there(tmp_path: Path) -> None:
    own = journal(tmp_path)
    first = own.store(pack_of(1), [0], of=1)
    own.append({"op": "x"})
    own.flush()
    second = own.store(pack_of(2), [0], of=1)
    own.append({"op": "y"})
    other = journal(as_killed(tmp_path))
    assert other.before == [{"op": "x"}] and other.holds(first[0]) and not other.holds(second[0])
    assert not other.damage
    other.close()
    assert readable(other) == [1]


def test_only_accepted_rows_are_kept(tmp_path: Path) -> None:
    own = journal(tmp_path)
    locations = own.store(pack_of(5, 6, 7), [0, 2], of=3)
    assert own.store(pack_of(8), [], of=1) == []
    assert draws_of(own, locations) == [5, 7]
    own.close()
    assert readable(own) == [5, 7]


def test_any_arrow_reader_opens_the_segments_and_what_is_written_to_is_left_out(tmp_path: Path) -> None:
    own = journal(tmp_path, segment_bytes=1 << 13)
    for draw in range(20):
        own.store(pack_of(draw, tokens=100), [0], of=1)
        own.flush()
    during = readable(own)
    assert during == list(range(len(during))) and len(during) < 20
    own.close()
    assert not own.damage and not list((tmp_path / "rollouts").glob("_*"))
    assert readable(own) == list(range(20))
    again = journal(tmp_path)
    assert not again.damage and again._next == 21


def test_sealing_moves_no_offset(tmp_path: Path) -> None:
    own = journal(tmp_path)
    locations = [own.store(pack_of(draw), [0], of=1)[0] for draw in range(5)]
    own.close()
    other = journal(tmp_path, cache_bytes=0)
    assert all(other.holds(each) for each in locations) and draws_of(other, locations) == list(range(5))


def test_the_cache_is_bounded_and_what_left_it_is_read_from_the_file(tmp_path: Path) -> None:
    pack = pack_of(0, tokens=100)
    own = journal(tmp_path, cache_bytes=3 * len(pack))
    locations = [own.store(pack_of(draw, tokens=100), [0], of=1)[0] for draw in range(10)]
    assert own._cached_bytes <= 3 * len(pack) and len(own._cache) == 3
    assert draws_of(own, locations) == list(range(10)) and own._cached_bytes <= 3 * len(pack)


def test_a_second_opener_is_refused_by_the_name_of_the_first(tmp_path: Path) -> None:
    own = journal(tmp_path)
    program = (
        "import sys; from millrace.core.replay.disk import DiskJournal\n"
        "from millrace.core.replay.journal import JournalConfig\n"
        "DiskJournal(sys.argv[1], JournalConfig()).records()\n"
    )
    call = [sys.executable, "-c", program, str(tmp_path)]
    refused = subprocess.run(call, capture_output=True, text=True, timeout=60)
    said = refused.stderr.strip().splitlines()[-1]
    assert "LedgerError" in said and "is held by process" in said and "since" in said and "millrace stop" in said
    own.append({"op": "x"})
    own.flush()
    own.close()
    assert subprocess.run(call, capture_output=True, timeout=60).returncode == 0
    assert list(journal(tmp_path).records()) == [{"op": "x"}]


HOLDS = """
import sys
from millrace.core.replay.disk import DiskJournal
from millrace.core.replay.journal import JournalConfig
own = DiskJournal(sys.argv[1], JournalConfig())
own.records()
print("held", flush=True)
sys.stdin.read()
"""


def test_a_holder_that_is_just_ending_is_waited_for(tmp_path: Path) -> None:
    call = [sys.executable, "-c", HOLDS, str(tmp_path)]
    with subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        holder.send_signal(signal.SIGSTOP)  # until it is killed it holds the file, whatever it does
        Timer(0.2, holder.kill).start()
        own = journal(tmp_path)
    own.append({"op": "x"})
    own.flush()


def test_a_commit_is_answered_when_no_loss_of_power_can_undo_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever hears of it deletes the checkpoint before it."""
    own = journal(tmp_path, fsync_s=3600)
    written: list[str] = []
    monkeypatch.setattr(syncer, "_fsync", lambda path: written.append(path.name) or "")
    own._syncer.stop()
    for op in ("trained", "committed", "announced"):
        own.append({"op": op})
        own.flush()
        written.append(op)
    assert written == ["trained", "ledger.sqlite-wal", "committed", "announced"]


def test_payloads_are_made_safe_before_the_rows_that_name_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(syncer, "_fsync", lambda path: written.append(path.name) or "")
    own = journal(tmp_path, fsync_s=0.01)
    for draw in range(2):  # the second time it is told while the thread knows of nothing, too
        written.clear()
        own.store(pack_of(draw), [0], of=1)
        own.flush()
        deadline = time.monotonic() + 10
        while "ledger.sqlite-wal" not in written and time.monotonic() < deadline:
            time.sleep(0.01)
        assert written == ["_000000.arrow", "ledger.sqlite-wal"]
    own.close()


def test_a_closed_journal_says_so(tmp_path: Path) -> None:
    own = journal(tmp_path)
    own.close()
    own.close()
    own.append({"op": "x"})
    with pytest.raises(JournalError, match="its run has ended"):
        own.flush()


# -- retention


def fill(own: DiskJournal, count: int = 24) -> list[tuple[int, int]]:
    locations = []
    for draw in range(count):
        locations += own.store(pack_of(draw, tokens=100), [0], of=1)
        own.flush()
    return locations


def segments(folder: Path) -> int:
    return len(list((folder / "rollouts").glob("*.arrow")))


def test_all_are_kept_by_default(tmp_path: Path) -> None:
    own = journal(tmp_path, segment_bytes=1 << 13)
    for draw, location in enumerate(fill(own)):
        own.forget(outcome(location, draw))
        assert not own.holds(location)
    own.flush()
    assert not own._cache and not own._places and not own._rows
    own.close()
    assert readable(own) == list(range(24))


def test_needed_keeps_a_segment_until_its_last_row_is_forgotten(tmp_path: Path) -> None:
    own = journal(tmp_path, segment_bytes=1 << 13, keep_rollouts="needed")
    locations = fill(own)
    many = segments(tmp_path)
    for draw, location in enumerate(locations[1:], 1):
        own.forget(outcome(location, draw))
        own.forget(outcome(location, draw))
    own.flush()
    for _ in range(500):  # what is being sealed at this moment stays until the next flush
        if segments(tmp_path) <= 2:
            break
        time.sleep(0.01)
        own.flush()
    assert segments(tmp_path) == 2 < many, "the first row's segment, and the one that is written to"
    other = journal(as_killed(tmp_path), segment_bytes=1 << 13, keep_rollouts="needed")
    assert other.holds(locations[0]) and not any(other.holds(each) for each in locations[1:]) and not other.damage
    other.forget(outcome(locations[0], 0))
    other.flush()
    other.close()
    assert segments(tmp_path.with_name(f"{tmp_path.name}-after")) == 0
    third = journal(tmp_path.with_name(f"{tmp_path.name}-after"))
    assert third.store(pack_of(99), [0], of=1)[0][0] > locations[-1][0], "a number of a deleted pack came back"


def test_sample_keeps_every_kth_draw_for_good(tmp_path: Path) -> None:
    own = journal(tmp_path, segment_bytes=1 << 13, keep_rollouts="sample", sample_every=8)
    locations = [*own.store(pack_of(7, 8, 9), [0, 1, 2], of=3), *fill(own, 7)]
    assert draws_of(own, locations) == [7, 8, 9, 0, 1, 2, 3, 4, 5, 6]
    for draw, location in zip([7, 8, 9, *range(7)], locations, strict=True):
        own.forget(outcome(location, draw))
    own.close()
    assert readable(own) == [8, 0]


def test_what_a_kill_between_the_rows_and_the_file_left_is_deleted_later(tmp_path: Path) -> None:
    own = journal(tmp_path, segment_bytes=1 << 12, keep_rollouts="needed")
    locations = fill(own, 6)
    copy = as_killed(tmp_path)
    own.close()
    rows = sqlite3.connect(copy / "ledger.sqlite")
    for draw, (pack, row) in enumerate(locations):
        rows.execute("insert into outcomes values (?, ?, ?, 0, 'committed', '', '', '', '')", (pack, row, draw))
    rows.commit()
    rows.close()
    other = journal(copy, keep_rollouts="needed")
    other.flush()
    assert segments(copy) == 0 and not other.damage


# -- compaction


def test_an_image_replaces_all_records(tmp_path: Path) -> None:
    own = journal(tmp_path)
    for number in range(5):
        own.append({"op": "x", "number": number})
    own.compact({"op": "image", "state": {}})
    own.append({"op": "y"})
    own.flush()
    assert own.behind == 2
    assert journal(as_killed(tmp_path)).before == [{"op": "image", "state": {}}, {"op": "y"}]


# -- where it lies, and what wrote it


@pytest.mark.parametrize("kind", ["nfs4", "cifs", "fuse.sshfs", "lustre", "9p", "fuse.glusterfs"])
def test_a_network_file_system_is_refused(tmp_path: Path, kind: str) -> None:
    mounts = f"/dev/sda / ext4 rw 0 0\nserver:/x {tmp_path} {kind} rw 0 0\nproc /proc proc rw 0 0\n"
    with pytest.raises(ConfigError, match=rf"{kind}.*mounted at {tmp_path}.*journal.on_disk = false"):
        ledger_file.refuse_network(tmp_path / "runs" / "new", mounts)


@pytest.mark.parametrize("kind", ["ext4", "xfs", "overlay", "tmpfs", "fuse.fuse-overlayfs", "fuseblk"])
def test_a_local_one_is_not(tmp_path: Path, kind: str) -> None:
    ledger_file.refuse_network(tmp_path, f"a / nfs4 rw 0 0\nb {tmp_path} {kind} rw 0 0\n")


def test_a_mount_point_with_a_space_and_a_longer_name_beside_it(tmp_path: Path) -> None:
    mounts = f"a / ext4 rw 0 0\nb {tmp_path}/my\\040runs nfs rw 0 0\nc {tmp_path}/ru cifs rw 0 0\n"
    assert ledger_file.filesystem(tmp_path / "my runs" / "x", mounts)[0] == "nfs"
    assert ledger_file.filesystem(tmp_path / "runs", mounts)[0] == "ext4"


def test_facts_of_rows_that_are_not_folded_are_read_from_them(tmp_path: Path) -> None:
    own = journal(tmp_path)
    locations = own.store(pack_of(1, 2), [0, 1], of=2)
    own.forget(outcome(locations[0], 1))
    own.flush()
    assert not own._connection.execute("select count(*) from packs").fetchone()[0], "they are folded already"
    other = journal(as_killed(tmp_path))
    assert [other.holds(each) for each in locations] == [False, True] and not other.damage
    assert other.export([outcome(locations[1], 2)]) == 4  # two rollouts each
    other.close()
    own.close()
    third = journal(tmp_path)
    assert [third.holds(each) for each in locations] == [False, True] and not third.damage


def test_facts_are_folded_once(tmp_path: Path) -> None:
    """Rows of deleted segments do not come back, and what is folded is not folded again."""
    own = journal(tmp_path, segment_bytes=1 << 12, keep_rollouts="needed")
    for draw, location in enumerate(fill(own, 40)):
        own.forget(outcome(location, draw))
    own.flush()
    gone = {each for (each,) in own._connection.execute("select segment from packs")}
    own.append({"op": "x"})
    own.flush()
    copy = as_killed(tmp_path)
    own.close()
    other = journal(copy, keep_rollouts="needed")
    assert not other.damage
    assert {each for (each,) in other._connection.execute("select segment from packs")} <= gone | {max(gone) + 1}


def test_a_row_that_was_never_there_is_not_held(tmp_path: Path) -> None:
    own = journal(tmp_path)
    assert not own.holds((1, 0)) and not own.damage
    with pytest.raises(PayloadError, match="row 0 of pack 1"):
        own.load((1, 0))


def test_a_file_that_nobody_needs_goes_before_its_rows_and_rows_without_it_are_no_damage(tmp_path: Path) -> None:
    """A kill between the two leaves rows that say what they are; the other way round it would leave a file unknown."""
    own = journal(tmp_path, segment_bytes=1 << 12, keep_rollouts="needed")
    locations = fill(own, 6)
    for draw, location in enumerate(locations):
        own.forget(outcome(location, draw))
    own.close()
    assert segments(tmp_path) == 0
    own = journal(tmp_path, segment_bytes=1 << 12, keep_rollouts="needed")
    locations = fill(own, 6)
    copies = []
    transaction = own._transaction

    def watched(write: object, **needed: int) -> None:
        if not copies and segments(tmp_path) < 2:
            copies.append(as_killed(tmp_path))
        transaction(write, **needed)

    own._transaction = watched
    for draw, location in enumerate(locations):
        own.forget(outcome(location, draw))
    own.close()
    other = journal(copies[0], keep_rollouts="needed")
    assert not other.damage and not any(other.holds(each) for each in locations)
    other.close()
    assert segments(copies[0]) == 0
    third = journal(copies[0])
    assert not third.damage and third.store(pack_of(99), [0], of=1)[0][0] > locations[-1][0]


def test_a_segment_that_goes_while_it_waits_to_be_sealed_is_no_damage(tmp_path: Path) -> None:
    own = journal(tmp_path, segment_bytes=1 << 12, keep_rollouts="needed")
    for number in range(200):
        for draw, location in enumerate(fill(own, 4)):
            own.forget(outcome(location, number * 4 + draw))
        own.flush()
    own.close()
    assert not own.damage and segments(tmp_path) == 0
