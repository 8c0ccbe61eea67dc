"""What is counted, what is compared, and that every rollout goes through once."""

import asyncio
import json
import sys
from pathlib import Path

import pytest

from benchmarks import queue_rates, queue_work
from benchmarks.queue_peers import talk
from benchmarks.queue_work import Clocks, Line
from millrace.core.replay.journal import MemoryJournal
from millrace.core.replay.queue import ReplayQueue

SCRIPT = """
import json, sys
print(json.dumps({"version": "one", "settings": ["slow", "quick"]}), flush=True)
for line in sys.stdin:
    order = json.loads(line)
    rate = {"slow": 1, "quick": 4}[order["setting"]] * order["batch"]
    print(json.dumps({"rollouts": rate, "put_s": 0.25, "take_s": 0.75}), flush=True)
"""


def line_of(batch: int, ahead: int, *, tokens: int = 32) -> Line:
    queue = ReplayQueue(queue_work.queue_config(batch, ahead), queue_work.Source(), seed=0, journal=MemoryJournal())
    return Line(queue, tokens=tokens, batch=batch, ahead=ahead, read=True)


@pytest.mark.parametrize("batch", [1, 16])
def test_a_round_puts_and_trains_every_rollout_once(batch: int) -> None:
    line, clocks = line_of(batch, 2), Clocks()

    async def went() -> dict[str, int]:
        await line.begin()
        for _ in range(9):
            await line.round(clocks)
        return dict((await line._queue.status()).tokens)

    tokens = asyncio.run(went())
    assert clocks.rollouts == 9 * 2 * batch
    assert tokens["generated"] == tokens["trained"] == clocks.rollouts * 32
    assert tokens["unaccounted"] == 0
    assert min(clocks.put_s, clocks.take_s, clocks.other_s) > 0
    assert clocks.all_calls < clocks.put_and_take
    assert 8 < line.wire_bytes[0] / tokens["trained"] == line.wire_bytes[1] / tokens["trained"]


def test_the_clocks_add_up() -> None:
    clocks = Clocks(rollouts=12, put_s=1.0, take_s=2.0, other_s=3.0)
    assert (clocks.put_and_take, clocks.all_calls) == (4.0, 2.0)


def test_the_best_cells_are_those_with_the_largest_median() -> None:
    found = {"ours 1": [1.0, 9.0, 2.0], "ours 16": [3.0, 3.0, 3.0], "ray 1": [2.0], "ray 16": [1.0]}
    own, theirs = queue_rates.cells_of(found, "ours"), queue_rates.cells_of(found, "ray")
    assert own == {1: [1.0, 9.0, 2.0], 16: [3.0, 3.0, 3.0]}
    assert (queue_rates.best(own), queue_rates.best(theirs)) == (16, 1)


def peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **other: object) -> queue_rates.Peer:
    """A script that answers at once."""
    folder = tmp_path / "benchmarks" / "queue_peers"
    folder.mkdir(parents=True)
    (folder / "made_up.py").write_text(SCRIPT)
    python = tmp_path / ".venv-x" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    monkeypatch.setattr(queue_rates.harness, "ROOT", tmp_path)
    return queue_rates.Peer("made_up", ".venv-x", {"small": 4.0}, **other)


def test_the_fastest_setting_of_each_cell_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = peer(tmp_path, monkeypatch)
    with queue_rates.Running(own) as running:
        chosen, pilot = queue_rates.best_settings(own, running, payload="small", seconds=0)
        assert running.version == "one"
    assert chosen == dict.fromkeys(queue_work.BATCHES, "quick")
    assert pilot[1] == {"batch": 16, "slow": 16, "quick": 64}


def test_a_setting_that_is_another_thing_is_told_and_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = peer(tmp_path, monkeypatch, leave_out=("quick",))
    with queue_rates.Running(own) as running:
        chosen, pilot = queue_rates.best_settings(own, running, payload="small", seconds=0)
    assert set(chosen.values()) == {"slow"} and pilot[0]["quick"] == 4


def test_a_missing_environment_names_its_target(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(queue_rates.harness, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match=r"make .venv-reverb/.ready"):
        queue_rates.Running(queue_rates.PEERS["reverb"])


def test_the_clock_of_a_queue_alone_counts_four_calls() -> None:
    class Slow:
        async def take(self) -> int:
            return 1

        async def lease_draws(self) -> int:
            return 2

    timed = queue_rates.Timed(Slow())
    assert asyncio.run(timed.lease_draws()) == 2 and timed.seconds == 0
    assert asyncio.run(timed.take()) == 1 and timed.seconds > 0


def test_bytes_per_token_hold_ids_and_log_probabilities() -> None:
    found = queue_rates.bytes_per_token(tokens=256, batch=16, rounds=2)
    assert 8 < found["put"] < 9 and found["taken"] == found["put"] < found["journal"]


# -- a peer's side


def test_a_peers_rounds_count_what_came_back() -> None:
    order = talk.Order(setting="", tokens=4, batch=3, alive=2, seconds=0.0, read=True)
    waiting: list[talk.Arrays] = []
    cleared = []

    def put(batches: list[list[talk.Arrays]]) -> None:
        assert [len(batch) for batch in batches] == [3, 3]
        waiting.extend(each for batch in batches for each in batch)

    def take(many: int) -> int:
        got, waiting[:] = list(waiting), []
        return len(got)

    found = talk.rounds(order, put, take, lambda: cleared.append(1))
    assert found.rollouts == 6, "the first round is not measured"
    assert len(cleared) == 2

    with pytest.raises(AssertionError, match="5 of 6 rollouts came back"):
        talk.rounds(order, put, lambda many: take(many) - 1)


def test_a_peers_rollout_has_twelve_bytes_per_token() -> None:
    (rollout,) = talk.rollouts(576, 1)
    assert sum(array.nbytes for array in rollout.values()) == 576 * queue_work.BYTES_PER_TOKEN == 6912


def test_an_order_is_what_the_script_sends() -> None:
    sent = {"setting": "x", "tokens": 4, "batch": 1, "alive": 2, "seconds": 1.0, "read": False}
    assert talk.Order(**json.loads(json.dumps(sent))) == talk.Order("x", 4, 1, 2, 1.0, False)
