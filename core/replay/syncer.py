"""The thread that makes a journal survive a loss of power, and seals its full segments."""

import os
from collections.abc import Sequence
from pathlib import Path
from threading import Condition, Thread

from millrace.core.replay.segments import Place, Segments, seal


class Syncer:
    """Consumes: word that something was written, full segments. Waits for: either. Nobody waits for it but the end.

    Payloads before the rows that name them: a row that outlives its payload is found by its checksum.
    """

    def __init__(self, ledger: Path, segments: Segments, every_s: float, damage: list[str]) -> None:
        """Args: ledger: its SQLite file; every_s: pause between two writes; damage: takes what fails, a line each."""
        self._segments = segments
        self._log = ledger.with_name(f"{ledger.name}-wal")
        self._every_s = every_s
        self._damage = damage
        self._change = Condition()
        self._dirty = False
        self._full: list[tuple[Path, Sequence[Place]]] = []
        self._sealing: Path | None = None
        self._ended = False
        self._thread = Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    def dirty(self) -> None:
        """The ledger was written to, and segments were that are open now."""
        if self._dirty:  # taken back before what it stands for is made safe: nothing written until here is left out
            return
        with self._change:
            self._dirty = True
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
                self._dirty = False
            while (segment := self._next()) is not None:
                self._attempt(*segment)
            for path in (*self._segments.paths, self._log) if dirty else ():
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
