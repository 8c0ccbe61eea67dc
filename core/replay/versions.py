"""Versions of the weights, forks of their history, lag, admission, and the stale rule `wait`. Pure.

A version is one integer, never reused, standing for (learner epoch, optimiser step). When a learner restarts from a
commit, versions beyond that commit belong to a dead branch: their lag counts the way back to the fork and forth again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from millrace.core.errors import LedgerError


@dataclass(slots=True)
class Versions:
    """All versions of a run, by number."""

    epochs: list[int] = field(default_factory=list)  # the learner epoch that reserved it
    steps: list[int] = field(default_factory=list)  # optimiser steps behind it
    forks: list[int] = field(default_factory=list)  # the last of these steps that is still in the surviving history
    announced: set[int] = field(default_factory=set)
    newest: int = -1  # the last one announced

    def reserve(self, epoch: int, step: int) -> int:
        """A new number, never used before."""
        self.epochs.append(epoch)
        self.steps.append(step)
        self.forks.append(step)
        return len(self.steps) - 1

    def announce(self, version: int) -> None:
        self.announced.add(version)
        self.newest = max(self.newest, version)

    def fork(self, step: int) -> None:
        """History goes on from `step`; what was published beyond it is a dead branch."""
        self.forks = [min(fork, step) for fork in self.forks]

    def lag(self, version: int, step: int) -> int:
        """Updates between the weights that sampled and those that step `step` changes.

            lag = (step - fork) + (its step - fork)

        Raises:
            LedgerError: the version was never reserved.

        >>> versions = Versions(); _ = [versions.reserve(1, s) for s in range(6)]
        >>> versions.fork(3)
        >>> versions.lag(2, 5), versions.lag(5, 5)
        (3, 4)
        """
        self.check(version)
        return step + self.steps[version] - 2 * self.forks[version]

    def deadline(self, version: int, max_lag: int) -> int:
        """The last step with lag(version, step) <= max_lag."""
        self.check(version)
        return max_lag + 2 * self.forks[version] - self.steps[version]

    def known(self, version: int) -> bool:
        """Reserved: its weights may lie in the WeightStore already, a moment before they are announced."""
        return 0 <= version < len(self.steps)

    def check(self, version: int) -> None:
        """Raises LedgerError for a version that nobody can hold."""
        if not self.known(version):
            raise LedgerError(
                f"version {version} was never reserved; the newest announced is {self.newest}. "
                "An engine serves only versions it fetched from the WeightStore"
            )


def admissible(lag: int, live: int, *, per_step: int, max_lag: int) -> int:
    """How many more groups an engine may be granted without any of them becoming too old in its turn.

        largest m with  lag + ceil((live + m) / B) - 1 <= max_lag

    Args:
        lag: step - version of the engine, in versions.
        live: groups ahead: leased, generated, scored or in a step.
        per_step: B, groups per step.

    >>> admissible(0, 0, per_step=4, max_lag=0), admissible(1, 3, per_step=4, max_lag=2)
    (4, 5)
    """
    return max(0, per_step * (max_lag - lag + 1) - live)


def possible(uses: int, *, first: int, last: int) -> int:
    """How many of `uses` of one group fit into steps: one in each from `first` to `last`.

        max(0, min(uses, last - first + 1))

    >>> possible(3, first=4, last=5), possible(1, first=4, last=5), possible(2, first=4, last=3)
    (2, 1, 0)
    """
    return max(0, min(uses, last - first + 1))


def places(deadline: int, rooms: Mapping[int, int], *, last: int, per_step: int) -> int:
    """Groups that can still enter a batch by `deadline`: what is open in recorded batches, and whole later steps.

        sum(rooms[k], k <= d) + B * max(0, d - last)

    >>> places(5, {3: 1, 4: 2}, last=4, per_step=4)
    7
    """
    return sum(room for step, room in rooms.items() if step <= deadline) + per_step * max(0, deadline - last)


def overfull(due: Mapping[int, int], rooms: Mapping[int, int], *, last: int, per_step: int) -> tuple[int, int] | None:
    """The first deadline by which more groups are due than can be trained, and how many too many; None if all fit.

    Args:
        due: deadline -> open groups (leased, generated or scored) that have it.
        rooms: step -> places left in its recorded batch.
        last: the last step with a recorded batch.
        per_step: B, groups per step.

    >>> overfull({3: 2, 4: 4}, {3: 2}, last=3, per_step=4), overfull({2: 1, 4: 7}, {3: 2}, last=3, per_step=4)
    (None, (2, 1))
    """
    total = 0
    for deadline in sorted(due):
        total += due[deadline]
        excess = total - places(deadline, rooms, last=last, per_step=per_step)
        if excess > 0:
            return deadline, excess
    return None


def forced(
    due: Mapping[int, int], ready: Mapping[int, int], rooms: Mapping[int, int], *, room: int, last: int, per_step: int
) -> list[tuple[int, int]] | None:
    """What the batch being formed must hold: for each (deadline, count), so many groups due by then. None: wait.

    Taking for step k is right only if afterwards, for every d, the open groups with deadline <= d number at most
    B * (d - k), or what is open in recorded batches besides; else one of them would become too old.

    Args:
        due: deadline -> open groups that have it, scored or not.
        ready: deadline -> scored ones among them.
        rooms: step -> places left in the other recorded batches.
        room: places left in the one being formed.
        last: the last step with a batch, this one among them.
        per_step: B, groups per step.

    >>> forced({3: 2, 4: 5}, {3: 2, 4: 3}, {}, room=4, last=3, per_step=4)
    [(3, 2), (4, 3)]
    >>> forced({3: 2, 4: 5}, {3: 1, 4: 3}, {}, room=4, last=3, per_step=4) is None
    True
    """
    musts, total, scored = [], 0, 0
    for deadline in sorted(due):
        total += due[deadline]
        scored += ready.get(deadline, 0)
        must = total - places(deadline, rooms, last=last, per_step=per_step)
        if must > min(scored, room):
            return None
        if must > 0:
            musts.append((deadline, must))
    return musts


def pick(order: Sequence[int], deadlines: Sequence[float], musts: Sequence[tuple[int, int]], room: int) -> list[int]:
    """The first `room` of `order` that satisfy `musts`, in order.

    Args:
        order: items, best first.
        deadlines: of each item of `order`; infinite where nothing is forced.
        musts: as `forced` returns them.

    >>> pick([7, 8, 9], [5, 5, 3], [(3, 1)], 2)
    [7, 9]
    """
    chosen: set[int] = set()
    for deadline, must in musts:
        must -= sum(deadlines[i] <= deadline for i in chosen)
        for i, due in enumerate(deadlines):
            if must <= 0:
                break
            if due <= deadline and i not in chosen:
                chosen.add(i)
                must -= 1
    for i in range(len(order)):
        if len(chosen) >= room:
            break
        chosen.add(i)
    return [order[i] for i in sorted(chosen)]
