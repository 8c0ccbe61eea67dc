"""Bugs to plant: each breaks one promise of the queue or of the learner, and must be found."""

from collections.abc import Callable
from typing import Any

from millrace.core.failpoint import reach
from millrace.core.replay import disk
from millrace.core.replay.disk import DiskJournal
from millrace.core.replay.draw_rules import DrawRules
from millrace.core.replay.draws import Entry
from millrace.core.replay.journal import Record
from millrace.core.replay.segments import Segments
from millrace.core.replay.state import LedgerState
from millrace.core.replay.step_rules import StepRules
from tests.faults.torture_learner import ChainLearner


def commits_before_the_rename() -> None:
    """The ledger points to a checkpoint that is not there yet."""
    ChainLearner.commits_first = True


def answers_before_the_flush() -> None:
    """Three flushes in four are left to a later call."""
    flush, calls = DiskJournal.flush, [0]

    def late(self: DiskJournal) -> None:
        calls[0] += 1
        if not calls[0] % 4:
            flush(self)

    DiskJournal.flush = late  # type: ignore[method-assign]


def redoes_in_another_order() -> None:
    """A second learner gets the recorded batch backwards."""
    take = StepRules.take

    def turned(self: StepRules, *, step: int, epoch: int) -> list[Entry] | None:
        found = take(self, step=step, epoch=epoch)
        return found if found is None or epoch == 1 else found[::-1]

    StepRules.take = turned  # type: ignore[method-assign]


def accepts_a_put_twice() -> None:
    """A group that is stored is stored again."""
    not_held, generated = DrawRules._not_held, LedgerState._generated

    def why(self: DrawRules, header: Any, epoch: int) -> str:
        return "" if self._stored(header) else not_held(self, header, epoch)

    def again(self: LedgerState, record: Record, now: float) -> None:
        fresh = [row for row in record["rows"] if self.draws[row[0]].location is None]
        generated(self, {**record, "rows": fresh}, now)

    DrawRules._not_held = why  # type: ignore[method-assign]
    LedgerState._generated = again  # type: ignore[method-assign]


def moves_the_pointer_alone() -> None:
    """The commit is one change, and the draws in it another."""
    committed = LedgerState._committed

    def halved(self: LedgerState, record: Record, now: float) -> None:
        trained = {draw.index: draw.state for draw in self.draws.values()}
        committed(self, record, now)
        late = [draw for draw in self.draws.values() if draw.state != trained[draw.index]]
        for draw in late[len(late) // 2 :]:
            self._move(draw, trained[draw.index])

    LedgerState._committed = halved  # type: ignore[method-assign]


def compacts_in_two_transactions() -> None:
    """First the records go, then their image comes."""

    def compact(self: DiskJournal, image: Record) -> None:
        self.flush()
        self._transaction(lambda connection: connection.execute("delete from records"), bytes_needed=0)
        reach("journal.compact")
        self.append(image)
        self.flush()
        self._behind = 1

    DiskJournal.compact = compact  # type: ignore[method-assign]


def rows_before_their_payload() -> None:
    """What names a payload is durable before it: the payload is written with the next one."""
    append, held = Segments.append, [b""]
    write = disk.segments._write

    def late(segment: Any, data: memoryview) -> None:
        if segment.end and len(data):
            held[0] = bytes(data)
            reach("journal.store.torn")
            return
        write(segment, data)

    def appended(self: Segments, messages: Any) -> Any:
        for segment in self.open.values():
            if held[0]:
                write(type(segment)(segment.number, segment.path, segment.fd, segment.end - len(held[0])), held[0])  # type: ignore[arg-type]
        held[0] = b""
        return append(self, messages)

    disk.segments._write = late  # type: ignore[assignment]
    Segments.append = appended  # type: ignore[method-assign]


def forgets_what_a_filter_did() -> None:
    """A filtered group stays in the next learner's batch."""
    undo = LedgerState._undo

    def kept(self: LedgerState, step: int, batch: Any) -> None:
        filtered = dict(batch.filtered)
        undo(self, step, batch)
        for draw in filtered:
            batch.entries = [entry for entry in batch.entries if entry.draw != draw]

    LedgerState._undo = kept  # type: ignore[method-assign]


def numbers_packs_anew() -> None:
    """After a restart a pack gets a number that was given out before."""
    opened = DiskJournal._open_segments

    def again(self: DiskJournal) -> None:
        opened(self)
        self._next = max(1, self._next - 1)

    DiskJournal._open_segments = again  # type: ignore[method-assign]


def repeats_are_answered_no() -> None:
    """A group that is stored is refused when its engine repeats the put."""
    DrawRules._stored = lambda self, header: False  # type: ignore[method-assign]


PLANTS: dict[str, Callable[[], None]] = {
    each.__name__: each
    for each in (
        commits_before_the_rename,
        answers_before_the_flush,
        redoes_in_another_order,
        accepts_a_put_twice,
        moves_the_pointer_alone,
        compacts_in_two_transactions,
        rows_before_their_payload,
        forgets_what_a_filter_did,
        numbers_packs_anew,
        repeats_are_answered_no,
    )
}


def plant(name: str) -> None:
    if name:
        PLANTS[name]()
