"""Files of lines that others read while they grow. On a full disk a line waits, and the run does not end for it."""

import errno
import os
from pathlib import Path

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class Lines:
    """Appends to a file. What finds no room goes with the next line that does, in order."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._waiting = b""

    def write(self, line: str) -> str:
        """It is on its way to the disk when the call returns.

        Returns:
            Why it is not: the path, what waits, and the system's word; "" where all is written.
        """
        self._waiting += line.encode() + b"\n"
        try:
            while self._waiting:
                self._waiting = self._waiting[os.write(self._fd, self._waiting) :]
        except OSError as caught:
            if caught.errno not in FULL:
                raise
            waits = f"{len(self._waiting)} bytes of {self._path} wait for room on the disk"
            return f"{waits} ({os.strerror(caught.errno or 0)}): make some, and nothing of it is lost"
        return ""

    def close(self) -> None:
        os.close(self._fd)
