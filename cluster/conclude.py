"""What a run leaves when it has ended: result.json, and model/, the model of its last checkpoint."""

import asyncio
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from millrace.cluster import incidents
from millrace.cluster.history import History
from millrace.cluster.lengths import trained_by_length
from millrace.cluster.plan import Plan
from millrace.cluster.record import Recorder, plain
from millrace.cluster.result import result
from millrace.cluster.run_directory import EVENTS, RESULT
from millrace.core.errors import MillraceError, boundary
from millrace.core.protocols import QueueStatus

SOON_S = 0.5  # for a worker to answer, which has nothing else to do any more


def conclude(
    plan: Plan,
    history: History,
    status: QueueStatus,
    lengths: Mapping[int, Sequence[int]],
    *,
    ended: str,
    idle_workers: Mapping[str, Mapping[str, float]],
    judge_failures: Mapping[str, Any] | None,
) -> Mapping[str, Any]:
    """Write them. Returns what result.json holds.

    Args:
        lengths: as the queue counts them, see `ReplayQueue.lengths`.
    """
    directory = plan.config.directory
    if status.checkpoint is not None:
        export(Path(status.checkpoint), directory / "model")
    found: dict[str, Any] = plain(
        result(
            plan,
            judge_failures=judge_failures,
            ended=ended,
            rows=history.rows,
            resumed_at=history.resumed_at,
            evaluations=sorted(history.held_out, key=lambda each: int(each["step"])),
            status=status,
            idle_workers=idle_workers,
            checkpoint=status.checkpoint,
            by_length=trained_by_length(lengths),
            events=incidents.read(directory / EVENTS),
        )
    )
    (directory / RESULT).write_text(json.dumps(found, indent=2) + "\n")
    return found


async def judge_failures(
    workers: Sequence[Any], status: QueueStatus, record: Recorder, *, say: Callable[[str], None]
) -> Mapping[str, Any] | None:
    """Verdicts that failed, as these reward workers count them, and the first one's cause; None where none did."""
    said = []
    for worker in workers:
        with suppress(MillraceError), boundary("asking the reward workers"):
            said.append(await asyncio.wait_for(worker.status(), SOON_S))
    many = sum(each["verdicts"]["judge_failed"] for each in said)
    if not many:
        return None
    first, dead = next(each["first_failure"] for each in said if each["first_failure"]), status.states.get("dead", 0)
    record.event("judge failures", verdicts=many, given_up_draws=dead, first=first)
    say(f"{many} verdicts failed and {dead} draws were given up; the first: {first.splitlines()[0]}")
    return {"verdicts": many, "first": first}


def export(checkpoint: Path, directory: Path) -> None:
    """The model of a checkpoint, without what only the learner needs."""
    if directory.exists():
        shutil.rmtree(directory)
    private = {"learner", "files.json"}
    shutil.copytree(checkpoint, directory, ignore=lambda _, names: private.intersection(names))
