"""What a kill of the queue's process leaves behind: the records that were flushed, and payloads, whole or torn."""

import json
from collections.abc import Callable, Sequence
from functools import wraps
from math import nan
from typing import Any

from millrace.core.replay.journal import Location, Record
from millrace.core.replay.ledger import Ledger
from millrace.core.replay.state import LedgerState
from tests.core.replay.copies import containers, copied

# Where the queue's process dies within a call.
POINTS = ("append", "flush", "answer")  # before the record; with records that no flush has reached; all but the answer
STORE_POINTS = ("stored", "torn")  # with a payload that no record names; with one whose bytes a power cut tore

_CALLS = ("join", "leave", "fence", "lease_draws", "put_groups", "fail_groups", "heartbeat", "expire", "lease_groups")
_CALLS += ("put_verdicts", "join_learner", "take", "filtered", "trained", "announce", "commit", "revert")


class QueueDied(BaseException):
    """The process is gone; nobody hears of it but its callers, who wait."""


class Disk:
    """A journal by its contract alone: payload, then records, then flush; `trap` is where the process dies."""

    def __init__(self) -> None:
        self.records: tuple[str, ...] = ()
        self.pending: list[str] = []
        self.payloads: set[Location] = set()
        self.forgotten: set[Location] = set()  # since the last flush
        self.trap = ""
        self.replayed = Replayed()  # one for all copies

    def copy(self) -> "Disk":
        new = object.__new__(Disk)
        new.__dict__.update(containers(self.__dict__))
        return new

    def append(self, record: Record) -> None:
        if self.trap == "append":
            raise QueueDied
        self.pending.append(json.dumps(record))

    def store(self, locations: Sequence[Location]) -> Sequence[Location]:
        if self.trap == "torn":
            self.trap = "answer"
        else:
            self.payloads.update(locations)
        if self.trap == "stored":
            raise QueueDied
        return locations

    def flush(self) -> None:
        if not self.pending:
            return
        if self.trap == "flush":
            raise QueueDied
        self.records = (*self.records, *self.pending)
        self.payloads -= self.forgotten
        self.pending, self.forgotten = [], set()
        if self.trap == "answer":
            raise QueueDied

    def restart(self, ledger: Ledger, known: tuple[str, ...]) -> None:
        """A new process reads what is there: the `known` records, as they were replayed before, and those since."""
        self.pending, self.forgotten, self.trap = [], set(), ""
        assert self.records[: len(known)] == known, "a record that was flushed is gone"
        ledger.state = self.replayed.state(ledger, known)
        ledger.replay(json.loads(record) for record in self.records[len(known) :])


class Replayed:
    """The last records that were replayed, and what they led to.

    Sound because a replay is a function of records and time: state by state, each from the one before it.
    """

    def __init__(self) -> None:
        self._records: tuple[str, ...] = ()
        self._at = nan
        self._state: LedgerState | None = None

    def __reduce__(self) -> tuple:
        """What is copied or pickled by other means begins anew."""
        return Replayed, ()

    def state(self, fresh: Ledger, records: tuple[str, ...]) -> LedgerState:
        """A copy of the state that these records lead to, replayed from where the last ones end, if these go on."""
        now, done = fresh.clock(), len(self._records)
        if now != self._at or self._records != records[:done]:
            self._state, self._at, done = fresh.state, now, 0
        if done < len(records):
            fresh.state = self._state
            fresh.replay(json.loads(record) for record in records[done:])
        self._records = records
        return copied(self._state)


class DurableLedger(Ledger):
    """Every call ends as the queue ends it: what is released is forgotten, what was recorded is flushed."""

    disk: Disk


def _durable(name: str) -> Callable[..., Any]:
    @wraps(getattr(Ledger, name))
    def call(self: DurableLedger, *args: Any, **fields: Any) -> Any:
        answer = getattr(Ledger, name)(self, *args, **fields)
        self.disk.forgotten.update(outcome.location for outcome in self.state.released)
        self.disk.flush()
        return answer

    return call


for _name in _CALLS:
    setattr(DurableLedger, _name, _durable(_name))
