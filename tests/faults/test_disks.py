"""Rows of the fault matrix that are the disk's: no room, and files that are damaged or gone. Whole runs."""

import hashlib
import os
import shutil
import sqlite3
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from millrace.cluster import jobs
from millrace.cluster.config import RunConfig
from millrace.core import calls, failpoint
from millrace.core.errors import JournalError, JournalFullError, LedgerError, MillraceError, TrainingError
from millrace.core.replay.draws import State
from tests.faults import invariants
from tests.faults.harness import Ended, Scene, run_here
from tests.faults.leaks import nothing_left

STEPS, PER_STEP = 12, 8
LOOP = {"loop": {"steps": STEPS}, "learner": {"learning_rate": 0.5, "threads": 1, "checkpoint_every": 2}}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of a few megabytes, where runs lie."""
    point = tmp_path / "runs"
    point.mkdir()
    call = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(point)]
    if os.geteuid() or subprocess.run(call, capture_output=True, timeout=20).returncode:
        pytest.skip("only root can make a small disk here")
    try:
        yield point
    finally:
        subprocess.run(["umount", "-l", str(point)], check=True, timeout=20)


class Ballast:
    """Takes all the room of a disk but some, and gives it back."""

    def __init__(self, disk: Path) -> None:
        self._path = disk / "ballast"

    def load(self, leave_bytes: int = 0) -> None:
        with suppress(OSError), self._path.open("ab", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)
        if leave_bytes:
            os.truncate(self._path, self._path.stat().st_size - leave_bytes)

    def drop(self) -> None:
        self._path.unlink()


@pytest.fixture
def at() -> Iterator[Callable[..., None]]:
    """Something is done when a failpoint of this process is reached for the n-th time."""
    seen: Counter[str] = Counter()
    wanted: dict[tuple[str, int], Callable[[], None]] = {}

    def hook(name: str) -> None:
        seen[name] += 1
        if act := wanted.pop((name, seen[name]), None):
            act()

    failpoint.arm(hook)
    try:
        yield lambda name, number, act: wanted.update({(name, number): act})
    finally:
        failpoint.arm(None)


def fails() -> None:
    raise TrainingError("the learner ends here")


def resumed(config: RunConfig) -> Ended:
    jobs.train(config, local=True, resume=True, say=lambda line: None)
    return Ended.of(config.directory)


def prints(directory: Path) -> dict[str, str]:
    """A fingerprint of every file."""
    found = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def checkpoint(config: RunConfig, step: int) -> Path:
    (found,) = (config.directory / "checkpoints").glob(f"step_{step}.*[0-9]")
    return found


def whole(ended: Ended) -> invariants.History:
    """All that must hold, but the rows of steps that a killed driver had not written yet."""
    found = invariants.hold(ended, whole=False)
    assert ended.status.state == "finished" and found.committed == found.config.loop.steps
    invariants.one_state(found)
    invariants.nothing_lost(found)
    assert found.states() == {State.COMMITTED: found.config.loop.steps * PER_STEP}
    return found


# -- no room


@pytest.mark.ray
def test_a_full_disk_holds_the_run_up_and_it_goes_on_when_there_is_room(paced_run: Any, small_disk: Path) -> None:
    """Journal, weights, logs and status find no room; nothing is lost by it, no row and no draw."""
    config, ballast = paced_run(loop={"steps": 30}), Ballast(small_disk)
    with nothing_left(), Scene.start(config, local=True) as scene:
        scene.until(lambda status: status.committed_step >= 4, what="a commit")
        before = prints(checkpoint(config, 4))
        ballast.load()
        said = scene.until(lambda status: status.waits.get("queue"), what="the queue to say what it waits for")
        for part in (str(config.directory), "No space left|full", "bytes are needed", "are free", "make room"):
            assert any(each in said for each in part.split("|")), said
        assert prints(checkpoint(config, 4)) == before
        ballast.drop()
        ended = scene.end()
    whole(ended)
    assert not ended.told("lost") and not ended.told("failed")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's writer
def test_a_run_that_finds_no_room_for_long_says_so_and_is_resumed(
    make_run: Any, small_disk: Path, at: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, ballast = make_run(**LOOP), Ballast(small_disk)
    monkeypatch.setattr(calls, "ROOM_S", 0.3)
    at("learner.step.before", 6, ballast.load)
    ended = run_here(config)
    assert ended.status.state == "failed" and ended.status.error is not None
    assert ended.status.error["kind"] == JournalFullError.__name__, ended.status.error
    for part in (str(config.directory), "bytes are needed", "are free", "make room on that disk"):
        assert part in ended.status.error["message"]
    kept = {step: prints(checkpoint(config, step)) for step in (2, 4)}
    ballast.drop()
    assert {step: prints(checkpoint(config, step)) for step in (2, 4)} == kept
    whole(resumed(config))


def test_a_checkpoint_without_room_is_left_out_and_told(make_run: Any, small_disk: Path, at: Any) -> None:
    config, ballast = make_run(**LOOP), Ballast(small_disk)
    kept: list[dict[str, str]] = []
    at("learner.step.after", 6, lambda: (kept.append(prints(checkpoint(config, 4))), ballast.load(2**20)))
    at("learner.step.after", 7, lambda: (kept.append(prints(checkpoint(config, 4))), ballast.drop()))
    ended = run_here(config)
    whole(ended)
    (told,) = ended.told("checkpoint skipped")
    assert told["step"] == 6 and "step_6." in told["why"]
    assert "it needs" in told["why"] and "are free there" in told["why"] and "free some space" in told["why"]
    assert kept[0] and kept[0] == kept[1]
    assert not list((config.directory / "checkpoints").glob("*.partial"))


# -- checkpoints


def interrupted(config: RunConfig, at: Any) -> dict[int, str]:
    """Seven steps made, four and six committed. Returns the weights after each."""
    at("learner.step.before", 8, fails)
    ended = run_here(config)
    assert ended.status.state == "failed" and checkpoint(config, 4) and checkpoint(config, 6)
    return {row["step"]: row["weights"] for row in ended.steps}


def flipped(path: Path, at: float = 0.5) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 1
    path.write_bytes(bytes(data))


DAMAGE: dict[str, Callable[[Path], None]] = {
    "a flipped bit of its weights": lambda path: flipped(path / "model.safetensors"),
    "truncated weights": lambda path: os.truncate(path / "model.safetensors", 1000),
    "a truncated optimiser": lambda path: os.truncate(path / "learner" / "optimiser.safetensors", 0),
    "no list of files": lambda path: (path / "files.json").unlink(),
    "another list of files": lambda path: flipped(path / "files.json"),
    "no state": lambda path: (path / "learner" / "state.json").unlink(),
    "gone": lambda path: shutil.rmtree(path),
}


@pytest.mark.parametrize(
    "what", [pytest.param(each, marks=[] if at < 1 else pytest.mark.faults) for at, each in enumerate(DAMAGE)]
)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_makes_the_same_again(
    make_run: Any, at: Any, what: str
) -> None:
    config = make_run(**LOOP)
    weights = interrupted(config, at)
    DAMAGE[what](checkpoint(config, 6))
    ended = resumed(config)
    whole(ended)
    (told,) = ended.told("checkpoint refused")
    assert told["step"] == 6 and "step_6." in told["directory"] and told["reverts_to"] == 4 and told["why"]
    again = {row["step"]: row["weights"] for row in ended.steps}
    assert len(weights) == 7 and weights == {step: again[step] for step in weights}


def test_a_run_without_any_readable_checkpoint_says_what_is_wrong_with_each(make_run: Any, at: Any) -> None:
    config = make_run(**LOOP)
    interrupted(config, at)
    for step in (4, 6):
        flipped(checkpoint(config, step) / "model.safetensors")
    with pytest.raises(TrainingError, match="no checkpoint of the run can be read") as caught:
        resumed(config)
    for part in ("step_4.", "step_6.", "model.safetensors", "Restore one from a copy"):
        assert part in str(caught.value)
    assert checkpoint(config, 4).is_dir() and checkpoint(config, 6).is_dir()


# -- the journal


def as_killed(config: RunConfig, at: Any) -> None:
    """The directory as a kill -9 in the eighth step leaves it."""
    copy = config.directory.with_name("copy")
    at("learner.step.before", 8, lambda: (shutil.copytree(config.directory, copy), fails()))
    run_here(config)
    shutil.rmtree(config.directory)
    copy.rename(config.directory)


def segment(directory: Path) -> Path:
    return max((directory / "rollouts").glob("*.arrow"))


def longer(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"torn" * 100)


PAYLOADS: dict[str, tuple[Callable[[Path], None], bool]] = {  # what is done, whether it is told
    "a torn tail": (longer, False),
    "a truncated segment": (lambda path: os.truncate(path, path.stat().st_size * 2 // 3), True),
    "a flipped bit": (lambda path: flipped(path, 0.99), True),
    "no segment": (lambda path: path.unlink(), True),
}


@pytest.mark.parametrize("what", PAYLOADS)
def test_what_a_damaged_segment_held_is_drawn_again(make_run: Any, at: Any, what: str) -> None:
    config = make_run(**LOOP)
    as_killed(config, at)
    damage, told = PAYLOADS[what]
    damage(segment(config.directory))
    ended = resumed(config)
    found = whole(ended)
    lines = [each["what"] for each in ended.told("damaged")]
    assert any("drawn again" in line and ".arrow" in line for line in lines) == told, lines
    assert (found.rows.get("failed:lost", 0) > 0) == told


@pytest.mark.parametrize("cut_bytes", [10, 5000, 40000])
def test_a_torn_last_record_takes_the_run_back_and_it_ends_as_any_other(make_run: Any, at: Any, cut_bytes: int) -> None:
    """As a loss of power leaves the log: what came last is not there, and what is there belongs together."""
    config = make_run(**LOOP)
    as_killed(config, at)
    log = config.directory / "ledger.sqlite-wal"
    os.truncate(log, log.stat().st_size - cut_bytes)
    whole(resumed(config))


def garbage(path: Path) -> None:
    path.write_bytes(b"not a database\n" * 1000)


def newer(path: Path) -> None:
    file = sqlite3.connect(path)
    file.execute("update meta set value = '99' where key = 'version'")
    file.commit()
    file.close()


LEDGERS: dict[str, tuple[Callable[[Path], None], type[MillraceError], str]] = {
    "gone": (lambda path: path.unlink(), JournalError, "is damaged: it is gone"),
    "empty": (lambda path: os.truncate(path, 0), JournalError, "is damaged: it is empty"),
    "truncated": (lambda path: os.truncate(path, path.stat().st_size // 2), JournalError, "is damaged"),
    "another file": (garbage, JournalError, "is damaged"),
    "newer": (newer, LedgerError, "a newer one wrote it"),
}


@pytest.mark.parametrize("what", LEDGERS)
def test_a_ledger_that_cannot_be_trusted_is_refused_and_nothing_is_touched(make_run: Any, at: Any, what: str) -> None:
    config = make_run(**LOOP)
    interrupted(config, at)
    damage, error, said = LEDGERS[what]
    damage(config.directory / "ledger.sqlite")
    before = prints(config.directory / "checkpoints")
    for _ in range(2):
        with pytest.raises(error, match=said) as caught:
            resumed(config)
        assert str(config.directory / "ledger.sqlite") in str(caught.value)
        assert len(str(caught.value).splitlines()) <= invariants.LINES
    assert prints(config.directory / "checkpoints") == before
