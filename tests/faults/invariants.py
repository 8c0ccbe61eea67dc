"""What must hold of every run that has ended, whatever was done to it; asserted from its directory alone.

    I1  every draw ended in exactly one state            I5  nothing is left behind (leaks.py)
    I2  no group is in two committed steps               I6  no token carries a wrong version
    I3  a loss is noticed within its bound               I7  the run goes on after a recovery
    I4  the message says who, what, why and what next    I8  the books close

`history` reads the ledger's records by rules of its own, written from design rather than from the code under test.
"""

import signal
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pyarrow.parquet as parquet

from millrace.cluster import config as configs
from millrace.cluster.config import RunConfig
from millrace.core.replay.disk import DiskJournal
from millrace.core.replay.draws import Draw, State
from millrace.core.replay.journal import Record
from millrace.core.replay.transaction import Transaction
from tests.faults.harness import Ended, Hit, Row

KILL_S = 3.0  # to notice a kill
HANG_S = 10.0  # and a process that is stopped
LINES = 15  # of a message
ENDS = frozenset({State.COMMITTED, State.FILTERED, State.STALE, State.DEAD})


@dataclass
class History:
    """The ledger of a run that has ended."""

    config: RunConfig
    records: list[Record]
    damage: list[str]
    draws: dict[int, Draw]  # every one there ever was, in its last state
    next_draw: int
    rows: dict[str, int]  # of the books
    most_alive: int  # draws at the same time, from lease to optimiser step
    trained: dict[int, list[tuple[int, int]]] = field(default_factory=dict)  # step -> (draw, attempt), surviving
    lags: dict[tuple[int, int, int], list[int]] = field(default_factory=dict)  # (step, draw, attempt) -> per run
    runs: dict[tuple[int, int], list[Any]] = field(default_factory=dict)  # group -> per rollout, (version, start, end)
    versions: set[int] = field(default_factory=set)  # ever reserved
    announced: set[int] = field(default_factory=set)
    committed: int = 0

    def states(self) -> Counter[State]:
        return Counter(draw.state for draw in self.draws.values())

    def in_state(self, *states: State) -> set[int]:
        """Draws."""
        return {index for index, draw in self.draws.items() if draw.state in states}

    @property
    def committed_draws(self) -> set[int]:
        return {draw for step in range(self.committed) for draw, _ in self.trained[step]}


def history(ended: Ended) -> History:
    """Open the ledger as a resumed run would, and close it again."""
    config = configs.of_directory(ended.directory)
    journal = DiskJournal(ended.directory, config.journal)
    try:
        records = list(journal.records())
        damage = list(journal.damage)
    finally:
        journal.close()
    assert all(record["op"] != "image" for record in records), "the ledger was compacted: let the run make fewer steps"
    ledger = Transaction(config.loop, clock=lambda: 0.0, emit=lambda record: None)
    draws: dict[int, Draw] = {}
    alive = 0
    for record in records:
        ledger.state.apply(record, 0.0)
        draws |= ledger.state.draws
        alive = max(alive, ledger.state.live)
    found = History(config, records, damage, draws, ledger.state.next_draw, ledger.state.books.table(), alive)
    _follow(found)
    return found


def _follow(found: History) -> None:
    """The batches of the surviving history, by a reading of the records that shares nothing with the ledger's."""
    per_step = found.config.loop.groups_per_step
    batches: dict[int, list[tuple[int, int]]] = {}
    filtered: dict[int, set[int]] = {}
    for record in found.records:
        match record["op"]:
            case "took":
                batches.setdefault(record["step"], []).extend((row[0], row[1]) for row in record["rows"])
                for draw, attempt, lags, _ in record["rows"]:
                    found.lags[record["step"], draw, attempt] = lags
            case "generated":
                for draw, attempt, _, runs, _ in record["rows"]:
                    assert (draw, attempt) not in found.runs, f"draw {draw} attempt {attempt} was accepted twice"
                    found.runs[draw, attempt] = runs
            case "filtered":
                filtered.setdefault(record["step"], set()).update(row[0] for row in record["rows"])
            case "trained":
                step = record["step"]
                left = [each for each in batches[step] if each[0] not in filtered.get(step, ())]
                found.trained[step] = left[:per_step]
                spare = set(left[per_step:])
                batches[step] = [each for each in batches[step] if each not in spare]
                found.versions.add(record["version"])
            case "rejoined":
                for step in [each for each in found.trained if each >= record["step"]]:
                    del found.trained[step]
                filtered = {step: draws for step, draws in filtered.items() if step < record["step"]}
                found.versions.add(record["version"])
            case "lost":
                gone = {tuple(row[:2]) for row in record["rows"]}
                for step in [each for each in batches if each not in found.trained]:
                    batches[step] = [each for each in batches[step] if each not in gone]
            case "announced":
                found.announced.add(record["version"])
            case "committed":
                found.committed = record["step"]
                _trained_once(found)
            case "reverted":
                found.committed = record["step"]


def _trained_once(found: History) -> None:
    """I2, at the moment of a commit."""
    assert set(range(found.committed)) <= found.trained.keys(), f"commit {found.committed} lacks steps"
    uses = Counter(draw for step in range(found.committed) for draw, _ in found.trained[step])
    often = {draw: many for draw, many in uses.items() if many > found.config.loop.reuse}
    assert not often, f"draws in more committed steps than reuse = {found.config.loop.reuse}: {often}"


def hold(ended: Ended, *, hits: Sequence[Hit] = (), whole: bool = True, clean: bool = True, kills: int = 0) -> History:
    """All of them but I5, which is asserted around the run.

    Args:
        hits: what was done to components, each of them lost by it.
        whole: the run is expected to have made all its steps.
        clean: the faults were of machines, not of data: no draw is given up, so that all are trained.
        kills: that were not sent by the test, each worth a heartbeat's tokens.
    """
    if whole:
        assert ended.status.state == "finished", ended.status.error or ended.status
    found = history(ended)
    if whole:
        steps = found.config.loop.steps
        assert [row["step"] for row in ended.steps] == list(range(1, steps + 1))
        assert found.committed == steps
    one_state(found, whole=whole)
    trained_once(ended, found)
    if clean and whole:
        nothing_lost(found)
    versions_are_right(found)
    kills += sum(hit.component.startswith(("generation", "queue")) for hit in hits)
    books_close(ended, found, kills=kills)
    for hit in hits:
        noticed(ended, hit)
        told(ended, hit)
        goes_on(ended, hit)
    return found


def one_state(found: History, *, whole: bool = True) -> None:
    """I1: each draw is known, and where the run is over, it has come to an end with a reason."""
    assert sorted(found.draws) == list(range(found.next_draw)), "draws without a state"
    if whole:
        open_ones = {index: draw.state.value for index, draw in found.draws.items() if draw.state not in ENDS}
        assert not open_ones, f"the run is over, and these draws are not: {open_ones}"


def trained_once(ended: Ended, found: History) -> None:
    """I2: by the records, and by the users' table where there is one."""
    _trained_once(found)
    loop = found.config.loop
    for step, groups in found.trained.items():
        assert len(groups) == loop.groups_per_step, f"step {step} was trained with {len(groups)} groups"
    table = ended.directory / "rollouts.parquet"
    if not table.exists():
        return
    seen: dict[tuple[int, int], set[int]] = {}  # (draw, step) -> attempts
    for row in parquet.read_table(table, columns=["draw", "attempt", "state", "steps"]).to_pylist():
        if row["state"] == "committed":
            for step in row["steps"]:
                seen.setdefault((row["draw"], step), set()).add(row["attempt"])
    assert all(len(attempts) == 1 for attempts in seen.values()), "two attempts of a draw were committed"
    assert max(Counter(draw for draw, _ in seen).values(), default=0) <= loop.reuse


def nothing_lost(found: History) -> None:
    """I8: without faults the first draws are trained, all of them; what took another place says by which rule."""
    loop = found.config.loop
    clean = set(range(loop.steps * loop.groups_per_step // loop.reuse))
    given_up = found.in_state(State.STALE, State.FILTERED)
    assert clean - found.committed_draws <= given_up, f"lost: {sorted(clean - found.committed_draws - given_up)}"
    assert not found.in_state(State.DEAD), f"given up: {found.in_state(State.DEAD)}"


def versions_are_right(found: History) -> None:
    """I6: announced weights sampled every trained token, no rollout has a gap, and no lag is beyond its bound."""
    loop = found.config.loop
    bounded = loop.stale in ("wait", "drop") or (loop.stale == "requeue" and loop.stale_then == "drop")
    for step, groups in found.trained.items():
        for group in groups:
            for runs in found.runs[group]:
                assert {run[0] for run in runs} <= found.announced, f"{group}: sampled by unknown weights, {runs}"
                assert all(a[2] == b[1] and a[0] < b[0] for a, b in pairwise(runs)), f"{group}: {runs}"
                assert not runs or runs[0][1] == 0, f"{group}: {runs}"
            lags = found.lags[(step, *group)]
            assert min(lags, default=0) >= 0
            if bounded:
                assert max(lags, default=0) <= loop.max_lag, f"{group} in step {step}: lags {lags}"


def books_close(ended: Ended, found: History, *, kills: int = 0) -> None:
    """I8: every token that an engine counted has a row; those of a kill's last heartbeat may have none."""
    rows = dict(found.rows if ended.result is None else ended.result["waste"])
    rows.pop("reused", 0)
    generated, unaccounted = rows.pop("generated"), rows["unaccounted"]
    assert generated == sum(rows.values()), f"{generated} generated tokens, but the rows are {rows}"
    config = found.config
    # In flight and leased ahead, and what finished since the last heartbeat and had not left yet.
    flight = 2 * (2 * config.generation.slots + config.loop.group_size) * config.sampling.max_tokens
    assert 0 <= unaccounted <= kills * flight, f"unaccounted: {unaccounted} of {rows}"
    if ended.result is not None:
        assert rows["trained"] == ended.result["tokens"]["trained"]
        assert rows["in_flight"] == rows["queued"] == 0 or ended.result["ended"] != "finished", rows


def loss_of(ended: Ended, hit: Hit) -> Row:
    """The event of the loss that a hit caused: the first of the component since."""
    losses = [each for each in ended.told("lost", component=hit.component) if each["time_s"] >= hit.time_s]
    assert losses, f"nobody noticed what was done to {hit.component} (process {hit.pid}): {ended.told('lost')}"
    return losses[0]


def noticed(ended: Ended, hit: Hit) -> float:
    """I3. Returns the seconds that it took."""
    took_s = float(loss_of(ended, hit)["time_s"]) - hit.time_s
    bound_s = HANG_S if hit.signal == signal.SIGSTOP else KILL_S
    assert took_s <= bound_s, f"{hit.component}: noticed after {took_s:.1f} s, the bound is {bound_s:g} s"
    return took_s


def told(ended: Ended, hit: Hit) -> str:
    """I4: the event and the message name component, process, draws, cause and what comes next, in few lines."""
    loss = loss_of(ended, hit)
    assert loss["cause"], f"without a cause: {loss}"
    if hit.pid:
        assert loss["pid"] == hit.pid, loss
    again = [each for each in ended.told("restarting", component=hit.component) if each["time_s"] >= loss["time_s"]]
    assert again and again[0]["restart"] >= 1 and again[0]["of"] >= 1, "no restart was told"
    message = _message(ended.said, f"{hit.component} (process {loss['pid'] or 'unknown'}) was lost")
    assert len(message) <= LINES, "\n".join(message)
    text = "\n".join(message)
    assert loss["cause"].splitlines()[0] in text, f"the cause is not told: {text}"
    assert "restart" in text, f"nothing says what comes next: {text}"
    for draw in loss["holds"][:4]:
        assert str(draw) in text, f"{draw} is not named: {text}"
    return text


def _message(said: Iterable[str], start: str) -> list[str]:
    """The lines of progress.log of one message: those behind its first that do not begin one."""
    found: list[str] = []
    for line in said:
        if start in line:
            found = [line]
        elif found and line.startswith((" ", "\t", "File", "Traceback")):
            found.append(line)
        elif found:
            break
    assert found, f"no message says {start!r}"
    return found


def goes_on(ended: Ended, hit: Hit) -> float:
    """I7: it serves again, and steps end after that. Returns the seconds that it was down."""
    loss = loss_of(ended, hit)
    back = [each for each in ended.told("serving", component=hit.component) if each["time_s"] >= loss["time_s"]]
    assert back, f"{hit.component} did not come back"
    assert back[0]["down_s"] > 0
    assert any(row["time_s"] > back[0]["time_s"] for row in ended.steps), "no step ended after the recovery"
    return float(back[0]["down_s"])
