"""Which checkpoints stay: those the ledger can fall back to, the last few, and the one of the best mean reward.

What else of them lies in their directory is an orphan: half written, or never committed by an incarnation that died.
"""

import json
import re
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

from millrace.learner.checkpoint import PARTIAL, STATE

Kept = tuple[str, float]  # directory, mean reward

_NAME = re.compile(rf"step_\d+\.\d+({re.escape(PARTIAL)})?")


def surviving(root: str, resumed: str) -> list[Kept]:
    """Checkpoints up to the one resumed from, in the order of their steps."""
    found = []
    last = step_of(Path(resumed))
    for path in _ours(root):
        if path.suffix != PARTIAL and step_of(path) < last and (path / STATE).is_file():
            found.append((step_of(path), str(path), _reward_of(path)))
    found.sort()
    return [*((path, reward) for _, path, reward in found), (resumed, _reward_of(Path(resumed)))]


def retain(
    root: str, committed: Sequence[Kept], *, keep: int, needed: Collection[int] = (), epoch: int | None = None
) -> list[Kept]:
    """Delete all but what the ledger needs, the last `keep` committed checkpoints and the one of the best mean reward.

    Args:
        root: the directory of checkpoints.
        committed: in the order of their commits.
        keep: at least 1.
        needed: steps of the commits that the ledger can fall back to.
        epoch: of this learner; what later ones write is theirs. None: there are none.
    Returns:
        those that stay, in their order.
    """
    best = max(committed, key=lambda kept: kept[1], default=None)
    last = len(committed) - max(keep, 1)
    stay = [kept for at, kept in enumerate(committed) if at >= last or kept is best or step_of(Path(kept[0])) in needed]
    collect(root, [directory for directory, _ in stay], epoch=epoch)
    return stay


def collect(root: str, stay: Collection[str], *, epoch: int | None = None) -> None:
    """Delete every checkpoint but those that stay, and what is half written.

    Args:
        stay: their directories.
        epoch: as of `retain`.
    """
    names = {Path(directory).name for directory in stay}
    for path in _ours(root):
        if path.name not in names and (epoch is None or _epoch_of(path) <= epoch):
            if path.suffix != PARTIAL:  # a kill in between leaves nothing that has the name of a whole one
                path = path.rename(path.with_name(path.name + PARTIAL))
            shutil.rmtree(path)


def _ours(root: str) -> list[Path]:
    """Checkpoints and half written ones, these first. What a person keeps beside them has another name."""
    found = (path for path in Path(root).glob("step_*.*") if _NAME.fullmatch(path.name))
    return sorted(found, key=lambda path: path.suffix != PARTIAL)


def step_of(path: Path) -> int:
    """Optimiser steps made before it was written."""
    return int(path.name.removeprefix("step_").partition(".")[0])


def _epoch_of(path: Path) -> int:
    return int(path.name.split(".")[1])


def _reward_of(path: Path) -> float:
    """Mean reward; of one whose state cannot be read, the lowest: the ledger says whether it is needed."""
    try:
        return float(json.loads((path / STATE).read_text())["reward"])
    except (OSError, ValueError, KeyError):
        return float("-inf")
