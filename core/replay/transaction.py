"""What all rules of the ledger share: its state, its clock, and the one way to change it."""

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

from millrace.core.errors import Fenced, LedgerError
from millrace.core.protocols import Clock, Role
from millrace.core.replay.config import QueueConfig
from millrace.core.replay.draws import CRASHES, JUDGE_CRASHED, Draw, State, Worker
from millrace.core.replay.journal import Record
from millrace.core.replay.state import LedgerState
from millrace.core.types import GroupId

TRACEBACK = 4096  # characters that are kept, from its end
_NONE: Mapping[int, str] = MappingProxyType({})


class Transaction:
    """Reads the state; changes it by records, each journalled before it is applied."""

    def __init__(self, config: QueueConfig, *, clock: Clock, emit: Callable[[Record], None]) -> None:
        self.config = config
        self.state = LedgerState(config.groups_per_step, config.max_lag, config.steps, config.reuse)
        self.clock = clock
        self.emit = emit

    def do(self, op: str, **fields: Any) -> None:
        """Journal one record, then make its change. Whole or not at all."""
        record = {"op": op, **fields}
        self.emit(record)
        self.state.apply(record, self.clock())

    def replay(self, records: Iterable[Record]) -> None:
        """Rebuild the state from a journal; every lease then has one full grace."""
        now = self.clock()
        for record in records:
            self.state.apply(record, now)
        self.state.released.clear()
        self.state.leases.restart(now)
        self.state.judgings.restart(now)

    def current(self, worker: str, epoch: int, role: Role) -> Worker:
        """The present incarnation of a worker.

        Raises:
            Fenced: the epoch has ended.
            LedgerError: it has another role.
        """
        entry = self.state.workers.get(worker)
        if entry is None or entry.epoch != epoch:
            now = "left or never joined" if entry is None else f"is at epoch {entry.epoch}"
            raise Fenced(f"{worker} calls with epoch {epoch}, but it {now}: join again and drop what you hold")
        if entry.role != role.value:
            raise LedgerError(f"{worker} joined as {entry.role} and calls as {role.value}: give each role its own name")
        return entry

    def learner(self, epoch: int) -> None:
        """Raises Fenced unless this is the present learner."""
        if epoch != self.state.epoch:
            raise Fenced(
                f"a learner of epoch {epoch} calls, but epoch {self.state.epoch} has begun: "
                "this process must end without writing anything"
            )

    def fail(
        self,
        draws: Iterable[tuple[Draw, int]],
        cause: str,
        *,
        counted: bool = True,
        tracebacks: Mapping[int, str] = _NONE,
    ) -> None:
        """End these attempts. A draw that failed too often is dead; another takes its place.

        Args:
            draws: with their tokens.
            counted: towards `attempts`; a crash counts towards `crashes` instead.
            tracebacks: by draw.
        """
        rows = []
        for draw, tokens in draws:
            state = State.DEAD if self._poison(draw, cause, counted) else State.WAITING
            traceback = tracebacks.get(draw.index, "")[-TRACEBACK:]
            rows.append([draw.index, draw.attempt, tokens, counted, state.value, traceback])
        if rows:
            self.do("failed", cause=cause, rows=rows)

    def _poison(self, draw: Draw, cause: str, counted: bool) -> bool:
        """Whether this failure is its last."""
        if cause in CRASHES:
            return draw.crashes + 1 >= self.config.crashes
        if cause == JUDGE_CRASHED:
            return draw.judge_crashes + 1 >= self.config.crashes
        return counted and draw.failures + 1 >= self.config.attempts

    def give_back(self, draws: Iterable[Draw], why: str, traceback: str = "") -> None:
        """These groups wait for another reward worker; what was generated stays."""
        rows = [[draw.index, draw.attempt] for draw in draws]
        if rows:
            self.do("returned", why=why, rows=rows, traceback=traceback[-TRACEBACK:])

    def judge_crashed(self, draws: Iterable[Draw], traceback: str) -> None:
        """Their judge's process is gone: judged again, or dead."""
        draws = list(draws)
        dead = [draw for draw in draws if self._poison(draw, JUDGE_CRASHED, False)]
        left = [draw for draw in draws if not self._poison(draw, JUDGE_CRASHED, False)]
        notes = {draw.index: traceback for draw in dead}
        self.fail(((draw, draw.tokens) for draw in dead), JUDGE_CRASHED, counted=False, tracebacks=notes)
        self.give_back(left, "crashed", traceback)

    def expire(self) -> bool:
        """End the leases whose time has come. True if there were any."""
        now = self.clock()
        lapsed, late = self.state.leases.lapsed(now), self.state.judgings.lapsed(now)
        if not lapsed and not late:
            return False
        draws = self.state.draws
        for cause, capped in (("expired", False), ("capped", True)):
            self.fail(((draws[h.draw], draws[h.draw].tokens) for h in lapsed if h.capped(now) == capped), cause)
        judged = [draws[hold.draw] for hold in late]
        worn = [draw for draw in judged if draw.judge_expiries >= self.config.judge_expiries]
        self.fail(((draw, draw.tokens) for draw in worn), "judge_expired")
        self.give_back((draw for draw in judged if draw.judge_expiries < self.config.judge_expiries), "expired")
        return True

    def next_expiry(self) -> float | None:
        """When `expire` may find something."""
        times = (self.state.leases.next_deadline(), self.state.judgings.next_deadline())
        return min((time for time in times if time is not None), default=None)

    def _placed(self, until: int) -> int:
        """Places taken in the recorded batches of steps up to `until`: a redone step is refilled before later ones."""
        per_step, step = self.config.groups_per_step, self.state.step
        batches = (batch for k, batch in self.state.batches.items() if step <= k <= until)
        return sum(min(per_step, len(batch.entries) - len(batch.filtered)) for batch in batches)

    def _needed(self, alive: int) -> int:
        """Places of the steps to come that neither the `alive` ones nor those taken fill."""
        steps = self.config.steps
        return self.config.groups_per_step * (steps - self.state.step) - alive - self._placed(steps)

    @property
    def finished(self) -> bool:
        """All steps are trained: no draw can be used any more."""
        return self.state.step >= self.config.steps


def ids(rows: Iterable[tuple[int, int]]) -> list[GroupId]:
    """Group ids of plain pairs."""
    return [GroupId(draw, attempt) for draw, attempt in rows]
