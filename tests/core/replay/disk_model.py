"""What a kill of the queue's process leaves behind: the records that were flushed, and payloads, whole or torn."""

import json
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

from millrace.core.replay.journal import Location, Record
from millrace.core.replay.ledger import Ledger

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
        self.records: list[str] = []
        self.pending: list[str] = []
        self.payloads: set[Location] = set()
        self.forgotten: set[Location] = set()  # since the last flush
        self.trap = ""

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
        self.records += self.pending
        self.payloads -= self.forgotten
        self.pending, self.forgotten = [], set()
        if self.trap == "answer":
            raise QueueDied

    def restart(self) -> list[Record]:
        """A new process reads what is there."""
        self.pending, self.forgotten, self.trap = [], set(), ""
        return [json.loads(record) for record in self.records]


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
