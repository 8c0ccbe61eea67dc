"""A sealed segment is an Arrow file like any other."""

import os
from pathlib import Path

import pyarrow as pa
import pytest

from millrace.core import schema
from millrace.core.replay.segments import Place, Segments, seal
from tests.core.replay.test_disk import pack_of


def filled(folder: Path, sizes: list[int]) -> tuple[Path, list[Place], list[schema.Pack]]:
    """A segment with packs of so many groups."""
    folder.mkdir()
    packs = [pack_of(*range(10 * number, 10 * number + size), tokens=3 + number) for number, size in enumerate(sizes)]
    segments = Segments(folder, first=7)
    places = segments.append([(True, memoryview(pack).cast("B")[len(schema.MARK) :]) for pack in packs])
    return segments.close(True).path, places, packs


@pytest.mark.parametrize("sizes", [[1], [3, 1, 2], [1] * 40, [5] * 7])
def test_it_is_byte_for_byte_what_arrow_writes(tmp_path: Path, sizes: list[int]) -> None:
    path, places, packs = filled(tmp_path / "rollouts", sizes)
    with path.open("ab") as file:
        file.write(b"what a flush never named")
    assert seal(path, places) == ""
    whole = pa.BufferOutputStream()
    with pa.ipc.new_file(whole, schema.SCHEMA) as writer:
        for pack in packs:
            writer.write_batch(schema.read(pack))
    assert (tmp_path / "rollouts" / "000007.arrow").read_bytes() == whole.getvalue().to_pybytes()


def test_a_damaged_pack_is_named(tmp_path: Path) -> None:
    path, places, _ = filled(tmp_path / "rollouts", [2, 2])
    with path.open("r+b") as file:
        file.seek(places[1].offset + places[1].length - 9)
        file.write(os.urandom(8))
    assert seal(path, places) == f"its pack at offset {places[1].offset} has another checksum than when written"
    assert path.exists()
