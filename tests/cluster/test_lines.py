"""Lines that find no room wait, in order."""

import errno
import os
from pathlib import Path

import pytest

from millrace.cluster import lines
from millrace.cluster.lines import Lines


def test_what_finds_no_room_goes_with_the_next_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    own, real, room = Lines(path), os.write, [9]

    def write(fd: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        done = real(fd, data[: room[0]])
        room[0] -= done
        return done

    monkeypatch.setattr(lines.os, "write", write)
    assert own.write("first") == ""
    why = own.write("second")
    assert str(path) in why and "4 bytes" in why and "No space left" in why
    assert "8 bytes" in own.write("xyz")
    room[0] = 100
    assert own.write("last") == ""
    own.close()
    assert path.read_text() == "first\nsecond\nxyz\nlast\n"


def test_another_failure_is_raised(tmp_path: Path) -> None:
    own = Lines(tmp_path / "x")
    own.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        own.write("x")
