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
        self._sealing: Path | None = None
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

    def write_log(self) -> None:
        """Return when the rows written so far would survive a loss of power."""
        self._attempt(self._log, None)

    def seal(self, path: Path, places: Sequence[Place]) -> None:
        """This segment is not written to any more; these are its packs."""
        with self._change:
            self._full.append((path, places))
            self._change.notify()

    def remove(self, path: Path) -> bool:
        """Delete a segment, which need not be sealed any more. False: it is being sealed at this moment."""
        names = {path.with_name(path.name.lstrip("_")), path.with_name("_" + path.name.lstrip("_"))}
        with self._change:
            if self._sealing in names:
                return False
            self._full = [each for each in self._full if each[0] not in names]
            try:
                for name in names:
                    name.unlink(missing_ok=True)
            except OSError:
                return False
        return True

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
                ended, dirty = self._ended, self._dirty
                self._dirty = set()
            while (segment := self._next()) is not None:
                self._attempt(*segment)
            for path in sorted(dirty, key=lambda path: path == self._log):
                self._attempt(path, None)
            if not ended:
                with self._change:
                    self._change.wait_for(lambda: self._ended, self._every_s)

    def _next(self) -> tuple[Path, Sequence[Place]] | None:
        """The segment to be sealed now."""
        with self._change:
            segment = self._full.pop(0) if self._full else None
            self._sealing = segment[0] if segment else None
            return segment

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
