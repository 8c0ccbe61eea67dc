"""Who holds what, and until when. Pure: time is an argument.

A lease has three durations: until its first token, from one progress to the next, and over all. Only progress renews
it, and nothing outlives the cap. Durations are data; deadlines are not: they are counted from when this process learnt
of the lease, so that a restart gives every lease one full grace.
"""

from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush


@dataclass(slots=True)
class Hold:
    """One worker's lease of one draw."""

    draw: int
    attempt: int
    worker: str
    epoch: int  # the worker's; a later one fences it
    start_s: float  # until the first progress
    lease_s: float  # from progress to progress
    cap_s: float  # in all
    progress: int = 0  # tokens, or verdicts
    granted_at: float = field(default=0.0, compare=False)
    seen_at: float = field(default=0.0, compare=False)  # its last progress, or when it was granted
    deadline: float = field(default=0.0, compare=False)
    queued: float = field(default=0.0, compare=False)  # the earliest deadline under which it stands in the heap

    def capped(self, now: float) -> bool:
        """It ran into the cap, not into silence."""
        return now >= self.granted_at + self.cap_s


@dataclass(slots=True)
class Leases:
    """All leases of one kind: of draws to generation workers, or of groups to reward workers."""

    held: dict[int, Hold] = field(default_factory=dict)  # by draw
    by_epoch: dict[int, dict[int, None]] = field(default_factory=dict)  # worker epoch -> draws
    heap: list[tuple[float, int, int]] = field(
        default_factory=list, compare=False
    )  # (deadline, draw, attempt), some old

    def grant(self, hold: Hold, now: float) -> None:
        hold.granted_at = hold.seen_at = now
        hold.deadline = hold.queued = now + min(hold.start_s, hold.cap_s)
        self.held[hold.draw] = hold
        self.by_epoch.setdefault(hold.epoch, {})[hold.draw] = None
        heappush(self.heap, (hold.deadline, hold.draw, hold.attempt))

    def renew(self, hold: Hold, progress: int, now: float) -> None:
        """More tokens than before renew the lease; a heartbeat alone does not."""
        if progress <= hold.progress:
            return
        hold.progress, hold.seen_at = progress, now
        hold.deadline = min(now + hold.lease_s, hold.granted_at + hold.cap_s)
        if hold.deadline < hold.queued:
            hold.queued = hold.deadline
            heappush(self.heap, (hold.deadline, hold.draw, hold.attempt))

    def end(self, draw: int) -> Hold:
        hold = self.held.pop(draw)
        mine = self.by_epoch[hold.epoch]
        del mine[draw]
        if not mine:
            del self.by_epoch[hold.epoch]
        return hold

    def of(self, epoch: int) -> list[Hold]:
        """The leases of one incarnation of a worker, oldest first."""
        return [self.held[draw] for draw in self.by_epoch.get(epoch, ())]

    def holder(self, draw: int, attempt: int, epoch: int) -> Hold | None:
        """The lease of this attempt, if this incarnation holds it."""
        hold = self.held.get(draw)
        return hold if hold is not None and (hold.attempt, hold.epoch) == (attempt, epoch) else None

    def lapsed(self, now: float) -> list[Hold]:
        """The leases whose deadline has come, earliest first. The caller ends them."""
        gone: dict[int, Hold] = {}
        while self.heap and self.heap[0][0] <= now:
            _, draw, attempt = heappop(self.heap)
            hold = self.held.get(draw)
            if hold is None or hold.attempt != attempt:
                continue
            if hold.deadline <= now:
                gone[draw] = hold
            else:
                hold.queued = hold.deadline
                heappush(self.heap, (hold.deadline, draw, attempt))
        return list(gone.values())

    def next_deadline(self) -> float | None:
        """The earliest time at which `lapsed` may find something."""
        while self.heap:
            _, draw, attempt = self.heap[0]
            hold = self.held.get(draw)
            if hold is not None and hold.attempt == attempt:
                return self.heap[0][0]
            heappop(self.heap)
        return None

    def restart(self, now: float) -> None:
        """One full grace for everyone, after the ledger was rebuilt from its journal."""
        for hold in self.held.values():
            hold.granted_at = hold.seen_at = now
            hold.deadline = hold.queued = now + min(max(hold.start_s, hold.lease_s), hold.cap_s)
        self.heap = [(hold.deadline, hold.draw, hold.attempt) for hold in self.held.values()]
        heapify(self.heap)
