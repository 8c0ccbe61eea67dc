"""What the ledger of a small world is given: a clock, and a journal that keeps an account of its own."""

from millrace.core.replay.config import QueueConfig
from millrace.core.replay.draws import State
from tests.core.replay.copies import containers
from tests.core.replay.disk_model import Disk

_OF_DATA = ("engine", "invalid", "judge", "judge_expired", "judge_crashed", "capped")
_UNCOUNTED = ("crashed", "hung", "judge_crashed", "fenced", "abandoned")


class Witness:
    """It knows its world no more than the ledger does: a world that is dropped is gone, and is no garbage."""

    def __init__(self, config: QueueConfig, *, disk: Disk | None, record: bool) -> None:
        self.config, self.disk = config, disk
        self.records: list[dict] | None = [] if record else None
        self.now = 0.0
        self.variations: dict[int, int] = {}  # by draw, as its failures ask for
        # By draw: crashes since it was generated, judge crashes, counted failures.
        self.fates: dict[int, tuple[int, int, int]] = {}

    def copy(self) -> "Witness":
        new = object.__new__(Witness)
        new.__dict__.update(containers(self.__dict__))
        new.disk = self.disk and self.disk.copy()
        return new

    def clock(self) -> float:
        return self.now

    def emit(self, record: dict) -> None:
        if self.disk is not None:
            self.disk.append(record)
        self._note(record)
        if self.records is not None:
            self.records.append(record)

    def _note(self, record: dict) -> None:
        """What a record means for seeds, suspicion and the end of a draw."""
        if record["op"] == "failed":
            cause = record["cause"]
            for index, _, _, counted, state, _ in record["rows"]:
                crashes, judged, failures = self.fates.get(index, (0, 0, 0))
                crashes, judged = crashes + (cause in ("crashed", "hung")), judged + (cause == "judge_crashed")
                self.fates[index] = crashes, judged, failures + counted
                self.variations[index] = self.variations.get(index, 0) + (cause in _OF_DATA)
                worn = crashes >= self.config.crashes or judged >= self.config.crashes
                dead = worn or failures + counted >= self.config.attempts
                assert (state == State.DEAD) == dead, f"draw {index} is {state} after {self.fates[index]}"
                assert counted == (cause not in _UNCOUNTED), f"{cause} of draw {index} counts {counted}"
        elif record["op"] == "stale" and record["rule"] == "requeue":
            for index, _, _ in record["rows"]:
                self.variations[index] = self.variations.get(index, 0) + 1
        elif record["op"] == "generated":
            for index, *_ in record["rows"]:
                if index in self.fates:
                    self.fates[index] = 0, *self.fates[index][1:]
        elif record["op"] == "returned" and record["why"] == "crashed":
            for index, _ in record["rows"]:
                crashes, judged, failures = self.fates.get(index, (0, 0, 0))
                self.fates[index] = crashes, judged + 1, failures
