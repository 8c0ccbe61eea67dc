"""A journal that finds no room: what the queue says of it, and that the same calls succeed later."""

import asyncio

import numpy as np
import pytest

from millrace.core.errors import JournalFullError
from millrace.core.protocols import Role
from millrace.core.replay.config import QueueConfig
from millrace.core.replay.journal import MemoryJournal
from millrace.core.replay.queue import ReplayQueue
from millrace.core.types import Prompt, WorkerId

WORKER = WorkerId("generation-0")


class Source:
    def draw(self, index: int) -> Prompt:
        return Prompt(id=f"p{index}", text=str(index), tokens_P=np.array([index], np.int32))


class Disk(MemoryJournal):
    full = False

    def flush(self) -> None:
        if self.full:
            raise JournalFullError("ledger.sqlite cannot be written: make room on that disk")
        super().flush()


def test_a_full_disk_is_in_the_status_until_the_same_call_has_succeeded() -> None:
    async def scene() -> None:
        now = 0.0
        disk = Disk()
        config = QueueConfig(groups_per_step=1, group_size=1, steps=3)
        queue = ReplayQueue(config, Source(), seed=0, clock=lambda: now, journal=disk)
        epoch = await queue.join(WORKER, role=Role.GENERATION, slots=2)
        assert "queue" not in (await queue.status()).idle
        disk.full = True
        for _ in range(2):
            with pytest.raises(JournalFullError):
                await queue.join(WORKER, role=Role.GENERATION, slots=2)
        assert "make room" in (await queue.status()).idle["queue"]
        disk.full = False
        assert await queue.join(WORKER, role=Role.GENERATION, slots=2) > epoch
        now = 6.0
        assert "queue" not in (await queue.status()).idle

    asyncio.run(scene())
