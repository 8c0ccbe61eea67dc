"""What must hold of a tortured run: read from its records by rules of its own, and from what its parts were told."""

import json
import sqlite3
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet

from millrace.core.replay.state import LedgerState
from millrace.core.replay.transaction import Transaction
from tests.faults.torture_learner import FIRST, damaged
from tests.faults.torture_plan import LONGEST, Plan, digest, dull, lines

Id = tuple[int, int]
GIVEN_UP = ("dead", "stale", "waiting")
MOST_LEASED = 4  # groups of one engine's request


@dataclass
class Reading:
    """History, from the records alone."""

    per_step: int
    leased: dict[int, int] = field(default_factory=dict)  # draw -> last attempt
    generated: set[Id] = field(default_factory=set)
    verdicts: dict[Id, list[Any]] = field(default_factory=dict)
    answered: set[Id] = field(default_factory=set)  # judged in any way
    gone: dict[int, str] = field(default_factory=dict)  # dead or stale draws
    waiting: set[int] = field(default_factory=set)  # for an engine
    entries: dict[int, dict[Id, list[int]]] = field(default_factory=dict)  # step -> group -> lags, in order
    filtered: dict[int, set[int]] = field(default_factory=dict)
    trained: dict[int, list[Id]] = field(default_factory=dict)
    commits: list[tuple[int, str, str]] = field(default_factory=list)  # ever made
    committed: int = 0
    announced: set[int] = field(default_factory=set)
    reuse: int = 1

    def read(self, record: dict[str, Any]) -> None:
        getattr(self, f"_{record['op']}", lambda record: None)(record)

    def _leased(self, record: dict[str, Any]) -> None:
        for draw, attempt in record["rows"]:
            assert attempt == self.leased.get(draw, -1) + 1, f"attempt {attempt} of draw {draw} was leased again"
            assert draw not in self.gone, f"draw {draw} is {self.gone[draw]}, and was leased again"
            self.leased[draw] = attempt
            self.waiting.discard(draw)

    def _generated(self, record: dict[str, Any]) -> None:
        for draw, attempt, *_ in record["rows"]:
            assert (draw, attempt) not in self.generated, f"draw {draw} attempt {attempt} was accepted twice"
            assert self.leased[draw] == attempt
            self.generated.add((draw, attempt))

    def _scored(self, record: dict[str, Any]) -> None:
        for draw, attempt, verdicts in record["rows"]:
            assert (draw, attempt) not in self.verdicts, f"draw {draw} attempt {attempt} was scored twice"
            self.verdicts[draw, attempt] = verdicts
            self.answered.add((draw, attempt))

    def _returned(self, record: dict[str, Any]) -> None:
        self.answered |= {(row[0], row[1]) for row in record["rows"]}

    def _failed(self, record: dict[str, Any]) -> None:
        assert record["cause"] != "lost", f"payloads were lost: {record}"
        self.answered |= {(row[0], row[1]) for row in record["rows"]}
        self.gone |= {row[0]: "dead" for row in record["rows"] if row[4] == "dead"}
        self.waiting |= {row[0] for row in record["rows"] if row[4] == "waiting"}

    def _stale(self, record: dict[str, Any]) -> None:
        self.gone |= {draw: "stale" for draw, _, state in record["rows"] if state == "stale"}
        self.waiting |= {draw for draw, _, state in record["rows"] if state == "waiting"}

    def _took(self, record: dict[str, Any]) -> None:
        batch = self.entries.setdefault(record["step"], {})
        for draw, attempt, lags, _ in record["rows"]:
            assert (draw, attempt) not in batch
            batch[draw, attempt] = lags

    def _filtered(self, record: dict[str, Any]) -> None:
        self.filtered.setdefault(record["step"], set()).update(row[0] for row in record["rows"])

    def _trained(self, record: dict[str, Any]) -> None:
        step, out = record["step"], self.filtered.get(record["step"], set())
        left = [each for each in self.entries[step] if each[0] not in out]
        assert len(left) >= self.per_step, f"step {step} was trained with {left}"
        self.trained[step] = left[: self.per_step]
        for spare in left[self.per_step :]:
            del self.entries[step][spare]

    def _announced(self, record: dict[str, Any]) -> None:
        self.announced.add(record["version"])

    def _rejoined(self, record: dict[str, Any]) -> None:
        self.trained = {step: groups for step, groups in self.trained.items() if step < record["step"]}
        self.filtered = {step: draws for step, draws in self.filtered.items() if step < record["step"]}

    def _committed(self, record: dict[str, Any]) -> None:
        self.committed = record["step"]
        self.commits.append((record["step"], record["directory"], record["digest"]))
        assert sorted(self.trained)[: self.committed] == list(range(self.committed)), "a commit of steps not trained"
        uses = Counter(draw for step in range(self.committed) for draw, _ in self.trained[step])
        assert max(uses.values(), default=0) <= self.reuse, f"trained twice: {uses.most_common(3)}"
        assert all(
            len({attempt for step in range(self.committed) for d, attempt in self.trained[step] if d == draw}) == 1
            for draw in uses
        ), "two attempts of one draw were trained"

    def _reverted(self, record: dict[str, Any]) -> None:
        self.committed = record["step"]

    def fates(self) -> dict[int, list[str]]:
        """Of every draw: one, if all is well."""
        found: dict[int, list[str]] = {draw: [] for draw in self.leased}
        for draw in {draw for step in range(self.committed) for draw, _ in self.trained[step]}:
            found[draw].append("committed")
        for draw in {draw for step in range(self.committed) for draw in self.filtered.get(step, ())}:
            found[draw].append("filtered")
        for draw, fate in self.gone.items():
            found[draw].append(fate)
        for draw in self.waiting:
            found[draw].append("waiting")
        return found


@dataclass
class Left:
    """What a run left behind."""

    plan: Plan
    root: Path
    reading: Reading
    state: LedgerState  # as a restart would read it
    outcomes: list[tuple[Any, ...]]

    @classmethod
    def of(cls, plan: Plan, root: Path) -> "Left":
        with sqlite3.connect(f"file:{root / 'ledger.sqlite'}?mode=ro", uri=True) as file:
            history, records = _records(file, "history"), _records(file, "records")
            outcomes = file.execute("select draw, attempt, state, steps from outcomes").fetchall()
            idle = "select segment from packs group by segment having not max(kept) and sum(rows) = (select count(*) "
            idle += "from outcomes join packs as own using (pack) where own.segment = packs.segment)"
            unneeded = file.execute(idle).fetchall()
        file.close()
        assert not unneeded, f"segments that nobody needs are still there: {unneeded}"
        whole, short = (Transaction(plan.queue, clock=lambda: 0.0, emit=lambda record: None) for _ in range(2))
        whole.replay(history)
        short.replay(records)
        assert whole.state == short.state, "what compaction left is not what the records say"
        reading = Reading(plan.queue.groups_per_step, reuse=plan.reuse)
        for record in history:
            reading.read(record)
        return cls(plan, root, reading, short.state, outcomes)


def hold(plan: Plan, root: Path, clean: Path, *, lost: int) -> None:
    """All of it. Args: clean: the same run without faults; lost: processes and workers, by kills and crashes."""
    left = Left.of(plan, root)
    nothing_is_lost(left)
    promises_are_kept(left)
    chain = chain_of(left)
    redone_alike(left)
    files_are_whole(left, chain[-1])
    table_is_right(left)
    books_close(left, lost)
    ages_are_bounded(left)
    if clean != root:
        as_without_faults(left, clean)


def _records(file: sqlite3.Connection, table: str) -> list[dict[str, Any]]:
    rows = [json.loads(text) for (text,) in file.execute(f"select record from {table} order by number")]
    return [record for row in rows for record in row["records"]]


def nothing_is_lost(left: Left) -> None:
    reading, fates = left.reading, left.reading.fates()
    assert reading.committed == left.plan.steps and left.state.commits[-1].step == left.plan.steps
    assert sorted(reading.leased) == list(range(len(reading.leased))) and left.state.next_draw == len(reading.leased)
    odd = {draw: fate for draw, fate in fates.items() if len(fate) != 1}
    assert not odd, f"draws that are not in exactly one final state: {odd}"
    by_ledger = {state.value: many for state, many in left.state.counts.items() if many}
    assert by_ledger == Counter(fate[0] for fate in fates.values()), f"the ledger counts {by_ledger}"
    for draw, (fate,) in fates.items():
        assert (fate == "filtered") == (fate not in GIVEN_UP and dull(left.plan, draw)), (draw, fate)
    # Further uses of others may take the place of a draw that waits to be begun anew.
    assert left.plan.reuse > 1 or "waiting" not in by_ledger, by_ledger
    if left.plan.stale not in ("drop", "requeue"):
        assert "stale" not in by_ledger, by_ledger


def promises_are_kept(left: Left) -> None:
    """What was answered is in the records."""
    reading = left.reading
    commits = {commit[0] for commit in reading.commits}
    trained = {group for groups in reading.trained.values() for group in groups}
    for what, *words in lines(left.root / "promises"):
        numbers = tuple(map(int, words))
        if what == "put":
            assert numbers in reading.generated, f"{numbers} was acknowledged and is not in the records"
        elif what == "refused":
            assert numbers not in trained, f"{numbers} was refused and is trained"
        elif what == "verdict":
            assert numbers in reading.answered, f"the verdict of {numbers} was acknowledged and is not in the records"
        elif what == "commit":
            assert numbers[0] in commits, f"commit {numbers} was acknowledged and is not in the records"


def chain_of(left: Left) -> list[str]:
    """The learner's chain, from the records and from what the engines said they sent."""
    reading, plan = left.reading, left.plan
    sent: dict[Id, str] = {}
    for draw, attempt, what in lines(left.root / "payloads"):
        known = sent.setdefault((int(draw), int(attempt)), what)
        assert known == what, f"draw {draw} attempt {attempt} was generated twice"
    masked = plan.stale == "mask"
    steps: dict[int, list[int]] = {}
    for step in range(reading.committed):
        for draw, _ in reading.trained[step]:
            steps.setdefault(draw, []).append(step)
    chain, seen = [FIRST["exact"]], FIRST["seen"]
    for step in range(reading.committed):
        for draw in _seen(left, step):
            seen = digest(seen, draw)
        facts = []
        for group in reading.trained[step]:
            lags, use = reading.entries[step][group], steps[group[0]].index(step)
            facts.append((group, sent[group], reading.verdicts[group], lags, use))
        chain.append(digest(chain[-1], step, facts, masked, seen))
    return chain


def _seen(left: Left, step: int) -> list[int]:
    """Draws in the order in which they came to the learner: a batch, then what filled its places."""
    entries, per_step = list(left.reading.entries[step]), left.reading.per_step
    seen: list[int] = []
    while True:
        batch = [draw for draw, _ in entries if draw not in seen or not dull(left.plan, draw)][:per_step]
        seen += [draw for draw in batch if draw not in seen]
        if not any(dull(left.plan, draw) for draw in batch):
            return seen


def redone_alike(left: Left) -> None:
    """Every incarnation of the learner made the same of a step."""
    made: dict[int, dict[str, list[str]]] = {}
    for step, exact, _, _, *ids in lines(left.root / "made"):
        made.setdefault(int(step), {}).setdefault(exact, ids)
    odd = {step: ids for step, ids in made.items() if len(ids) > 1}
    assert not odd, f"redone with another result: {odd}"
    assert sorted(made) == list(range(left.plan.steps))


def files_are_whole(left: Left, last: str) -> None:
    """The checkpoints that the ledger names, no others, and no file half written."""
    for commit in left.state.commits:
        if commit.directory:
            assert damaged(Path(commit.directory), commit.digest) in ("", "spoilt"), commit
    final = Path(left.state.commits[-1].directory or "")
    assert json.loads((final / "state.json").read_text())["exact"] == last, "the learner's chain is not the ledger's"
    steps = {int(path.name.split("_")[1].partition(".")[0]) for path in (left.root / "checkpoints").iterdir()}
    # A learner that dies between a commit and the removal of the oldest checkpoint leaves that one to the next commit;
    # where that happens at the last two commits, two are left.
    assert len(steps - {commit.step for commit in left.state.commits}) <= 2, steps
    assert not list((left.root / "checkpoints").glob("*.partial"))
    assert not list((left.root / "rollouts").glob("_*")), "a segment was not sealed"


def table_is_right(left: Left) -> None:
    """The users' table: each committed group once, with the steps that trained it."""
    trained: dict[Id, list[int]] = {}
    for step in range(left.reading.committed):
        for group in left.reading.trained[step]:
            trained.setdefault(group, []).append(step)
    facts = [
        ((draw, attempt), json.loads(steps)) for draw, attempt, state, steps in left.outcomes if state == "committed"
    ]
    assert len(facts) == len(dict(facts)), "a group has two fates"
    assert all(trained.get(group) == steps for group, steps in facts)
    rows = parquet.read_table(
        left.root / "rollouts.parquet", columns=["draw", "attempt", "state", "steps"], use_threads=False
    )
    members = Counter((row["draw"], row["attempt"]) for row in rows.to_pylist() if row["state"] == "committed")
    assert set(members.values()) <= {left.plan.queue.group_size} and members.keys() <= trained.keys()
    if left.plan.keep_rollouts == "all":
        assert members.keys() == trained.keys(), "trained groups that the table lacks"
    for row in rows.to_pylist():
        if row["state"] == "committed":
            assert row["steps"] == trained[row["draw"], row["attempt"]]


def books_close(left: Left, lost: int) -> None:
    """Every token has a row; what an engine held when it was lost, and had counted, may have none."""
    rows = left.state.books.table()
    rows.pop("reused", 0)
    generated, unaccounted = rows.pop("generated"), rows["unaccounted"]
    assert generated == sum(rows.values()), rows
    most = lost * left.plan.engines * MOST_LEASED * left.plan.queue.group_size * (LONGEST + 1)
    assert 0 <= unaccounted <= most, rows
    assert rows["queued"] == rows["in_flight"] == 0, rows


def ages_are_bounded(left: Left) -> None:
    if left.plan.stale not in ("wait", "drop", "requeue"):
        return
    for step in range(left.reading.committed):
        for group in left.reading.trained[step]:
            lags = left.reading.entries[step][group]
            assert min(lags) >= 0 and max(lags) <= left.plan.max_lag, f"{group} in step {step}: {lags}"


def as_without_faults(left: Left, clean: Path) -> None:
    """The same draws; and without any lag the same weights after every step."""
    other = Left.of(left.plan, clean)
    if left.plan.same_draws:
        assert left.reading.fates() == other.reading.fates(), "the run without faults trained other draws"
    if not left.plan.max_lag:
        one, two = (
            {int(step): weights for step, _, weights, *_ in lines(root / "made")} for root in (left.root, clean)
        )
        assert one == two, f"other weights than without faults: {sorted(k for k in one if one[k] != two.get(k))}"
