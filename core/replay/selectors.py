"""Catalogue: in which order scored groups are taken.

A selector orders candidates; the stale rule `wait` then takes those first that must be taken now. Where groups are
reused, those with fewer uses behind them go first: a group stands in a batch once, and needs a step for every use.
"""

from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["deadline", "fifo", "freshest"]


class Candidate(NamedTuple):
    """A scored group, or one that may be trained again, as a selector sees it."""

    draw: int  # lease order: a draw keeps its index over attempts
    deadline: int  # the last step it may be trained in
    lag: int  # of its oldest token, in versions, if it were trained now
    use: int = 0  # how often it was trained; the first use comes before deadline, a further one need not come


def fifo(candidates: Sequence[Candidate]) -> list[Candidate]:
    """In the order in which the draws were first leased, never in the order of completion.

        key = (use, draw)

    Source: Queue table of Reverb (Cassirer et al. 2021), arXiv:2102.04736.

    Args:
        candidates: scored groups, any order.

    >>> [c.draw for c in fifo([Candidate(3, 4, 0), Candidate(1, 6, 2)])]
    [1, 3]
    """
    return sorted(candidates, key=lambda c: (c.use, c.draw))


def freshest(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The smallest lag first, then lease order.

        key = (lag, use, draw)

    Source: Lifo selector of Reverb (Cassirer et al. 2021), arXiv:2102.04736, with age counted in versions.

    Args:
        candidates: scored groups, any order.

    >>> [c.draw for c in freshest([Candidate(1, 4, 2), Candidate(2, 6, 0), Candidate(3, 6, 0)])]
    [2, 3, 1]
    """
    return sorted(candidates, key=lambda c: (c.lag, c.use, c.draw))


def deadline(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The earliest deadline first, then lease order.

        key = (deadline, use, draw)

    Source: Scheduling algorithms for multiprogramming in a hard-real-time environment (Liu and Layland 1973),
    doi:10.1145/321738.321743.

    Args:
        candidates: scored groups, any order.

    >>> [c.draw for c in deadline([Candidate(1, 6, 0), Candidate(2, 4, 2), Candidate(3, 6, 0)])]
    [2, 1, 3]
    """
    return sorted(candidates, key=lambda c: (c.deadline, c.use, c.draw))
