"""Our queue on Ray with its journal on disk, beside the queues of others; the journal's price; bytes per token.

A cell is a number of rollouts in a put and in a take. Ours and the peer's alternate, cell by cell; the figure is the
ratio of the best cells of both. Each peer runs in an environment of its own, as its documentation says, in the best of
several settings.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import asyncio
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from benchmarks import harness, queue_work
from benchmarks.queue_work import BATCHES, PAYLOADS, Clocks, Line
from millrace.cluster.runtime import ray_cluster
from millrace.cluster.spawn import OnRay
from millrace.core.replay.disk import DiskJournal
from millrace.core.replay.journal import JournalConfig, MemoryJournal
from millrace.core.replay.queue import ReplayQueue

UNLIKE = (
    "the peer has no journal on disk, no leases, no versions or lag, no verdicts, and repeats nothing safely; an item "
    "is a rollout there, a group here"
)
IN_CLOCK = (
    "encode, put_groups, take, decode, trained; every 16 steps commit. 'all_calls' adds lease_draws, lease_groups, "
    "decode, put_verdicts, announce, heartbeat"
)


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is measured beside us."""

    module: str
    environment: str  # its folder
    targets: Mapping[str, float]  # by payload
    leave_out: tuple[str, ...] = ()  # settings that are another thing; told, not compared

    @property
    def python(self) -> Path:
        return harness.ROOT / self.environment / "bin" / "python"


PEERS = {
    "ray": Peer("ray_queue", ".venv", {"small": 5.0}, ("stacked",)),
    "reverb": Peer("reverb_server", ".venv-reverb", {"small": 4.0, "large": 3.0}),
    "transferqueue": Peer("transfer_queue", ".venv-transferqueue", {"small": 5.0}),
}


class Running:
    """A peer's script in its own environment."""

    def __init__(self, peer: Peer) -> None:
        """Raises SystemExit when its environment was not made."""
        if not peer.python.exists():
            sys.exit(f"{peer.python} is not there: `make {peer.environment}/.ready` makes it")
        command = [str(peer.python), "-m", f"benchmarks.queue_peers.{peer.module}"]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # for as long as the process
        self._process = subprocess.Popen(
            command, cwd=harness.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        first = self._answer()
        self.version, self.settings = first["version"], list(first["settings"])

    def rate(self, setting: str, *, payload: str, batch: int, seconds: float) -> float:
        """Rollouts per second."""
        order = {
            "setting": setting,
            "tokens": PAYLOADS[payload],
            "batch": batch,
            "alive": queue_work.batches_alive(payload, batch),
            "seconds": seconds,
            "read": payload == "large",
        }
        assert self._process.stdin is not None
        print(json.dumps(order), file=self._process.stdin, flush=True)
        found = self._answer()
        return float(found["rollouts"] / (found["put_s"] + found["take_s"]))

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            sys.exit(f"{self._process.args!r} has ended:\n{self._log.read()[-2000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._log.close()


# -- ours


class Ours:
    """Our queue as an actor, one for each cell, all the while: its memory is as warm as in a run."""

    def __init__(self, payload: str, directory: Path) -> None:
        """Args: directory: of the journals."""
        self._spawn = OnRay()
        self._payload, self._directory = payload, directory
        self._lines: dict[int, Line] = {}
        self.all_calls: dict[int, list[float]] = {}  # batch -> rollouts per second, of every measurement

    def rate(self, batch: int, *, seconds: float) -> float:
        """Rollouts per second, put and take."""
        clocks = asyncio.run(self._measured(batch, seconds))
        self.all_calls.setdefault(batch, []).append(clocks.all_calls)
        return clocks.put_and_take

    async def _measured(self, batch: int, seconds: float) -> Clocks:
        if batch not in self._lines:
            ahead = queue_work.batches_alive(self._payload, batch)
            journal = DiskJournal(self._directory / f"run-{batch}", JournalConfig())
            config, source = queue_work.queue_config(batch, ahead), queue_work.Source()
            queue = self._spawn(
                ReplayQueue, config, source, name=f"queue-{batch}", lasting=True, seed=0, journal=journal
            )
            tokens, read = PAYLOADS[self._payload], self._payload == "large"
            self._lines[batch] = Line(queue, tokens=tokens, batch=batch, ahead=ahead, read=read)
            await self._lines[batch].begin()
        return await queue_work.rounds(self._lines[batch], seconds=seconds)

    def end(self) -> None:
        self._spawn.kill()


# -- comparing


def best(cells: Mapping[int, Sequence[float]]) -> int:
    """The batch with the largest median.

    >>> best({1: [5.0, 1.0, 1.0], 16: [2.0, 2.0, 2.0]})
    16
    """
    return max(cells, key=lambda batch: median(cells[batch]))


def cells_of(found: Mapping[str, Sequence[float]], who: str) -> dict[int, list[float]]:
    """The measurements of one arm, by batch."""
    return {int(name.split()[1]): list(values) for name, values in found.items() if name.split()[0] == who}


def best_settings(peer: Peer, running: Running, *, payload: str, seconds: float) -> tuple[dict[int, str], list[Any]]:
    """For each batch the fastest; and all that was found."""
    chosen, pilot = {}, []
    for batch in BATCHES:
        rates = {name: running.rate(name, payload=payload, batch=batch, seconds=seconds) for name in running.settings}
        pilot.append({"batch": batch, **{name: round(rate) for name, rate in rates.items()}})
        print(f"  {running.version}, {batch}: " + ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items()))
        compared = {name: rate for name, rate in rates.items() if name not in peer.leave_out}
        chosen[batch] = max(compared, key=lambda name: compared[name])
    return chosen, pilot


def compare(name: str, payload: str, *, pairs: int, seconds: float, where: str) -> harness.Row:
    """One row: our best cell over the peer's."""
    peer = PEERS[name]
    with tempfile.TemporaryDirectory() as directory, ray_cluster(), Running(peer) as running:
        ours = Ours(payload, Path(directory))
        settings, pilot = best_settings(peer, running, payload=payload, seconds=seconds / 2)
        arms: dict[str, Callable[[], float]] = {}
        for batch in BATCHES:
            arms[f"ours {batch}"] = partial(ours.rate, batch, seconds=seconds)
            arms[f"{name} {batch}"] = partial(
                running.rate, settings[batch], payload=payload, batch=batch, seconds=seconds
            )
        found = harness.interleave(arms, pairs=pairs)
        ours.end()
        version = running.version
    own, theirs = cells_of(found, "ours"), cells_of(found, name)
    mine, its = best(own), best(theirs)
    ratio = harness.ratio(own[mine], theirs[its])
    payload_bytes = PAYLOADS[payload] * queue_work.BYTES_PER_TOKEN
    everything = harness.ratio(ours.all_calls[mine][-pairs:], theirs[its])
    details: dict[str, object] = {
        "peer": version,
        "rollouts_per_s": found,
        "best_cells": {"ours": mine, name: its},
        "settings_of_the_peer": settings,
        "pilot": pilot,
        "mb_per_s_at_12_bytes_per_token": {
            "ours": median(own[mine]) * payload_bytes / 1e6,
            name: median(theirs[its]) * payload_bytes / 1e6,
        },
        "in_the_clock": IN_CLOCK,
        "all_calls": {"rollouts_per_s": ours.all_calls, "ratio": str(everything)},
        "what_the_peer_does_not_do": UNLIKE,
    }
    target = peer.targets.get(payload)
    size = f"{payload_bytes / 1000:.1f} KB" if payload == "small" else f"{payload_bytes / 1000:.0f} KB"
    return harness.row(
        f"{'P1' if payload == 'small' else 'P2'}/{name}",
        f"queue, journal on disk / {version}, put and take of {size} rollouts, best cell of each",
        ratio,
        target=(">=", target) if target else None,
        where=where,
        details=details,
    )


# -- the journal's price


class Timed:
    """A queue of this process, with a clock on the calls that put and take."""

    COUNTED = ("put_groups", "take", "trained", "commit")

    def __init__(self, queue: ReplayQueue) -> None:
        self._queue = queue
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._queue, name)
        if name not in self.COUNTED:
            return method  # type: ignore[no-any-return]  # a bound coroutine method

        async def call(*args: Any, **kwargs: Any) -> Any:
            began = perf_counter()
            answer = await method(*args, **kwargs)
            self.seconds += perf_counter() - began
            return answer

        return call


@contextmanager
def alone(batch: int, payload: str, *, on_disk: bool) -> Iterator[tuple[Line, Timed, Path]]:
    """A queue in this process."""
    ahead = queue_work.batches_alive(payload, batch)
    with tempfile.TemporaryDirectory() as name, ExitStack() as ends:
        directory = Path(name) / "run"
        journal = DiskJournal(directory, JournalConfig()) if on_disk else MemoryJournal()
        ends.callback(journal.close)
        timed = Timed(ReplayQueue(queue_work.queue_config(batch, ahead), queue_work.Source(), seed=0, journal=journal))
        yield Line(timed, tokens=PAYLOADS[payload], batch=batch, ahead=ahead, read=False), timed, directory


def alone_rate(batch: int, *, on_disk: bool, seconds: float) -> float:
    """Rollouts per second in the calls that put and take."""
    with alone(batch, "small", on_disk=on_disk) as (line, timed, _):

        async def measured() -> Clocks:
            await queue_work.begun(line)
            timed.seconds = 0.0
            return await queue_work.rounds(line, seconds=seconds)

        return asyncio.run(measured()).rollouts / timed.seconds


def journal_price(*, pairs: int, seconds: float, where: str) -> list[harness.Row]:
    """A row for each batch."""
    rows = []
    for batch in BATCHES[1:]:
        arms = {
            "disk": lambda batch=batch: alone_rate(batch, on_disk=True, seconds=seconds),
            "memory": lambda batch=batch: alone_rate(batch, on_disk=False, seconds=seconds),
        }
        print(f"  packs of {batch}")
        found = harness.interleave(arms, pairs=pairs)
        what = f"queue alone, journal on disk / in memory, put and take of 6.9 KB rollouts in packs of {batch}"
        details: dict[str, object] = {"rollouts_per_s": found, "in_the_clock": ", ".join(Timed.COUNTED)}
        ratio = harness.ratio(found["disk"], found["memory"])
        rows.append(harness.row(f"P3/{batch}", what, ratio, target=(">=", 0.7), where=where, details=details))
    return rows


# -- bytes


def bytes_per_token(tokens: int, batch: int, rounds: int) -> dict[str, float]:
    """That cross the queue, each way, and that the journal holds in the end."""
    ahead = 4
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name) / "run"
        journal = DiskJournal(directory, JournalConfig())
        config = queue_work.queue_config(batch, ahead)
        line = Line(
            ReplayQueue(config, queue_work.Source(), seed=0, journal=journal),
            tokens=tokens,
            batch=batch,
            ahead=ahead,
            read=False,
        )

        async def went() -> None:
            await line.begin()
            for _ in range(rounds):
                await line.round(Clocks())

        asyncio.run(went())
        journal.close()
        held = queue_work.journal_bytes(directory)
    total = tokens * batch * ahead * rounds
    return {"put": line.wire_bytes[0] / total, "taken": line.wire_bytes[1] / total, "journal": held / total}


def byte_rows(*, where: str) -> list[harness.Row]:
    """Wire and journal, of rollouts of 576 tokens in groups of 8; shorter and longer ones in the details."""
    found = {tokens: bytes_per_token(tokens, 64, 16) for tokens in (64, 576, 4096)}
    details: dict[str, object] = {"bytes_per_token_by_length": found}
    wire = max(found[576]["put"], found[576]["taken"]) / queue_work.BYTES_PER_TOKEN
    held = found[576]["journal"] / queue_work.BYTES_PER_TOKEN
    target: harness.Target = ("<=", 1.05)
    what = "bytes per token / 12, 576 tokens per rollout"
    return [
        harness.row("P17/wire", f"{what}: put or taken, the larger", wire, target=target, where=where, details=details),
        harness.row("P17/journal", f"{what}: in the journal", held, target=target, where=where, details=details),
    ]


def main() -> None:
    """Everything, or the part that the command line names."""
    parser = harness.arguments(__doc__)
    parser.add_argument("--peer", choices=sorted(PEERS), help="only beside this one")
    parser.add_argument("--payload", choices=sorted(PAYLOADS), help="only rollouts of this size")
    parser.add_argument("--part", choices=("peers", "journal", "bytes"), help="only this part (default: each)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of one measurement")
    given = parser.parse_args()
    part = given.part or ("peers" if given.peer or given.payload else "")
    harness.refuse_a_busy_machine(anyway=given.busy)
    where = harness.machine()
    rows: list[harness.Row] = []
    if part in ("", "peers"):
        for name, peer in PEERS.items():
            for payload in PAYLOADS:
                asked = given.peer in (None, name) and given.payload in (None, payload)
                if asked and (payload in peer.targets or (given.peer == name and given.payload == payload)):
                    print(f"{name}, {payload}")
                    rows.append(compare(name, payload, pairs=given.pairs, seconds=given.seconds, where=where))
    if part in ("", "journal"):
        rows += journal_price(pairs=given.pairs, seconds=given.seconds, where=where)
    if part in ("", "bytes"):
        rows += byte_rows(where=where)
    if given.no_record:
        for row in rows:
            print(f"{row.id}: {row.value:.3f} {row.interval or ''} {row.what}")
    else:
        harness.record(rows)


if __name__ == "__main__":
    main()
