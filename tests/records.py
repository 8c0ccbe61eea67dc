"""The records of a run's ledger, once nobody runs in its directory."""

from pathlib import Path
from typing import Any

from millrace.core.replay.disk import DiskJournal
from millrace.core.replay.journal import JournalConfig


def records(directory: Path) -> list[dict[str, Any]]:
    """All of them, oldest first: short runs are never compacted."""
    journal = DiskJournal(directory, JournalConfig())
    found = list(journal.records())
    journal.close()
    return found
