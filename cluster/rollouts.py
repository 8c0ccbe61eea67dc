"""The rollouts of a run that does not run, as the table that a finished run leaves."""

import asyncio
from pathlib import Path

from millrace.cluster import config as configs
from millrace.cluster import run_directory
from millrace.core.errors import ConfigError
from millrace.core.replay.disk import DiskJournal
from millrace.core.replay.queue import ReplayQueue
from millrace.core.replay.rollouts import NAME
from millrace.core.types import Prompt


class _NoPrompts:
    """Nothing is drawn from a run that does not run."""

    def draw(self, index: int) -> Prompt:
        raise IndexError(f"draw {index}: this run does not run")


def write(directory: Path) -> tuple[Path, int]:
    """Write rollouts.parquet of a run, however it ended. Returns its path and the number of its rows.

    Raises:
        ConfigError: it has no ledger, or runs right now: it writes the table itself when it is done.
        JournalError: the ledger is damaged.
    """
    config = configs.of_directory(directory)
    if not (directory / "ledger.sqlite").is_file():
        raise ConfigError(
            f"{directory} has no ledger.sqlite: its run has generated nothing, or was told journal.on_disk = false"
        )

    async def exported() -> int:
        journal = DiskJournal(directory, config.journal)
        queue = ReplayQueue(config.loop, _NoPrompts(), seed=config.seed, journal=journal)
        try:
            return await queue.export()
        finally:
            await queue.close()

    with run_directory.held(directory):
        rows = asyncio.run(exported())
    return directory / NAME, rows
