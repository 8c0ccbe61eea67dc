"""The thread that makes a journal survive a loss of power, and seals its full segments."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from threading import Condition, Thread

from millrace.core.replay.segments import Place, seal


class Syncer:
    """Consumes: paths that were written to, full segments. Waits for: either. Nobody waits for it, except at the end.

    Payloads before the rows that name them: a row that outlives its payload is found by its checksum.
    """

    def __init__(self, ledger: Path, every_s: float, damage: list[str]) -> None:
        """Args: ledger: its SQLite file; every_s: pause between two writes; damage: takes what fails, a line each."""
        self._log = ledger.with_name(f"{ledger.name}-wal")
        self._every_s = every_s
        self._damage = damage
        self._change = Condition()
        self._dirty: set[Path] = set()
        self._full: list[tuple[Path, Sequence[Place]]] = []
        self._ended = False
        self._thread = Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    def dirty(self, paths: Iterable[Path]) -> None:
        """These were written to, and so was the ledger."""
        with self._change:
            idle = not self._dirty
            self._dirty |= {self._log, *paths}
            if idle:
                self._change.notify()

    def seal(self, path: Path, places: Sequence[Place]) -> None:
        """This segment is not written to any more; these are its packs."""
        with self._change:
            self._full.append((path, places))
            self._change.notify()

    def stop(self) -> None:
        """Return when everything given so far is done."""
        with self._change:
            self._ended = True
            self._change.notify()
        self._thread.join()

    def _run(self) -> None:
        ended = False
        while not ended:
            with self._change:
                self._change.wait_for(lambda: self._dirty or self._full or self._ended)
                ended, dirty, full = self._ended, self._dirty, self._full
                self._dirty, self._full = set(), []
            for path, places in full:
                self._attempt(path, places)
            for path in sorted(dirty, key=lambda path: path == self._log):
                self._attempt(path, None)
            if not ended:
                with self._change:
                    self._change.wait_for(lambda: self._ended, self._every_s)

    def _attempt(self, path: Path, places: Sequence[Place] | None) -> None:
        """What does not work is said, and left: the next opening seals it, and a kill alone loses nothing."""
        try:
            why = seal(path, places) if places is not None else _fsync(path)
        except OSError as caught:
            why = str(caught)
        if why:
            what = "made an Arrow file" if places is not None else "made safe against a loss of power"
            line = f"{path} could not be {what}: {why}"
            if line not in self._damage:
                self._damage.append(line)


def _fsync(path: Path) -> str:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:  # sealed, or deleted, which made it safe
        return ""
    try:
        os.fdatasync(fd)
    finally:
        os.close(fd)
    return ""
