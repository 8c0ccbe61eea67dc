"""The table of rollouts: one row for each, with everything the ledger knows of it, and one line that opens it."""

import asyncio
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from millrace.core import schema
from millrace.core.errors import JournalError
from millrace.core.replay import rollouts
from millrace.core.replay.journal import Outcome
from millrace.core.types import Group, GroupId, Prompt, Rollout, VersionRun
from tests.core.replay.life import TOKENS, Life, a_life_until_the_kill


def rows(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist()


def test_every_rollout_of_a_run_is_a_row_with_its_fate(tmp_path: Path) -> None:
    async def main() -> None:
        life = await a_life_until_the_kill(tmp_path)
        count = await life.queue.export()
        table = rows(tmp_path / "rollouts.parquet")
        assert count == len(table) == 2 * life.queue._ledger.state.next_draw
        assert [(row["draw"], row["member"]) for row in table] == [(i // 2, i % 2) for i in range(count)]
        by_state = {row["state"] for row in table}
        assert by_state == {"committed", "trained", "scored", "generated"}
        first = table[0]
        assert first == {
            "draw": 0,
            "attempt": 0,
            "member": 0,
            "prompt_id": "p0",
            "prompt": "What is 0?",
            "answer": "0",
            "tokens": [0] * TOKENS,
            "behaviour_logprob": [-0.5] * TOKENS,
            "version_first": 0,
            "version_last": 0,
            "finish_reason": "stop",
            "seed": 0,
            "score": 1.0,
            "verdict": "scored",
            "components": '{"exact": 1.0}',
            "feedback": "right",
            "state": "committed",
            "rule": None,
            "steps": [0],
            "lag": 0,
        }
        waiting = table[-1]
        assert (waiting["state"], waiting["score"], waiting["verdict"], waiting["steps"], waiting["lag"]) == (
            "generated",
            None,
            None,
            [],
            None,
        )
        trained = [row for row in table if row["steps"] == [1]]
        assert len(trained) == 4 and all(row["tokens"] == [row["draw"]] * TOKENS for row in table)
        await life.queue.close()

    asyncio.run(main())


def test_a_resumed_run_has_the_rows_of_all_its_lives(tmp_path: Path) -> None:
    async def main() -> None:
        first = await a_life_until_the_kill(tmp_path / "run")
        await first.queue.close()
        second = Life(tmp_path / "run")
        await second.begin()
        while second.step < 4:
            await second.one_step()
        await second.commit()
        await second.queue.export()
        table = rows(tmp_path / "run" / "rollouts.parquet")
        trained = [(row["draw"], row["steps"]) for row in table if row["state"] == "committed"]
        assert len(trained) == 16 and len({(row["draw"], row["attempt"], row["member"]) for row in table}) == len(table)
        assert sorted(step for _, (step,) in trained) == [step for step in range(4) for _ in range(4)]
        stale = [row for row in table if row["state"] == "stale"]
        assert all(row["rule"] and not row["steps"] for row in stale)
        await second.queue.close()

    asyncio.run(main())


def test_what_is_damaged_is_left_out_and_named(tmp_path: Path) -> None:
    async def main() -> None:
        life = await a_life_until_the_kill(tmp_path)
        (segment,) = (tmp_path / "rollouts").glob("*")
        data = bytearray(segment.read_bytes())
        data[-100] ^= 0xFF
        segment.write_bytes(bytes(data))
        whole = 2 * life.queue._ledger.state.next_draw
        assert 0 < await life.queue.export() < whole
        (line,) = await life.queue.damage()
        assert segment.name in line and "left out" in line

    asyncio.run(main())


def test_only_what_is_kept_is_a_row(tmp_path: Path) -> None:
    async def main() -> None:
        life = await a_life_until_the_kill(tmp_path, keep_rollouts="needed", segment_bytes=1 << 12)
        while life.step < 4:
            await life.one_step()
        await life.commit()
        count = await life.queue.export()
        assert count < 2 * life.queue._ledger.state.next_draw
        assert count == len(rows(tmp_path / "rollouts.parquet"))

    asyncio.run(main())


def group(draw: int, *lengths: int, versions: int = 2) -> Group:
    def rollout(length: int) -> Rollout:
        cuts = np.linspace(0, length, versions + 1).astype(int)
        runs = tuple(VersionRun(7 + i, int(cuts[i]), int(cuts[i + 1])) for i in range(versions))
        return Rollout(
            tokens_T=np.arange(length, dtype=np.int32),
            sampled_T=np.arange(length) % 2 == 0,
            behaviour_logprob_T=np.linspace(-1, 0, length, dtype=np.float32),
            versions=runs,
            finish_reason="length",
            seed=draw,
        )

    prompt = Prompt(id=f"p{draw}", text="é", tokens_P=np.zeros(2, np.int32))
    return Group(id=GroupId(draw, 3), prompt=prompt, rollouts=tuple(map(rollout, lengths)), lease_epoch=1)


def test_groups_of_a_pack_in_any_order_and_rollouts_of_any_length() -> None:
    pack = schema.encode([group(0, 5), group(1, 0, 2, 9), group(2), group(3, 4, 4, versions=0)])
    verdict = ("judge_failed", None, {}, "no judge")
    outcomes = [
        Outcome((1, 3), 3, 3, "failed", (), "judge", None, ()),
        Outcome((1, 1), 1, 3, "committed", (4, 6), "", [verdict] * 3, (0, 1, 2)),
        Outcome((1, 2), 2, 3, "stale", (), "drop", None, ()),
    ]
    batch = rollouts.rows_of(pack, outcomes)
    batch.validate(full=True)
    found = batch.to_pylist()
    assert [(row["draw"], row["member"], len(row["tokens"])) for row in found] == [
        (3, 0, 4),
        (3, 1, 4),
        (1, 0, 0),
        (1, 1, 2),
        (1, 2, 9),
    ]
    assert [(row["version_first"], row["version_last"]) for row in found] == [(None, None)] * 2 + [(7, 8)] * 3
    assert [row["lag"] for row in found] == [None, None, 0, 1, 2]
    assert found[2]["steps"] == [4, 6] and found[0]["rule"] == "judge" and found[4]["verdict"] == "judge_failed"
    assert len(rollouts.rows_of(pack, [outcomes[2]])) == 0


def test_row_groups_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollouts, "_ROW_GROUP_BYTES", 1 << 14)
    outcome = Outcome((1, 0), 0, 3, "committed", (0,), "", None, (0,))
    packs = ((schema.encode([group(draw, 100)]), [outcome]) for draw in range(100))
    assert rollouts.write(tmp_path / "t.parquet", packs) == 100
    file = pq.ParquetFile(tmp_path / "t.parquet")
    assert 1 < file.num_row_groups < 50
    assert max(file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups)) < 1 << 16


def test_a_group_whose_fate_is_decided_meanwhile_is_in_the_table_once(tmp_path: Path) -> None:
    async def main() -> None:
        life = await a_life_until_the_kill(tmp_path)
        state = life.queue._ledger.state
        live = [state.outcome(draw) for draw in state.draws.values() if draw.location is not None]
        life.journal.forget(live[0]._replace(state="filtered"))
        life.journal.flush()
        assert life.journal.export(live) == 2 * state.next_draw
        table = rows(tmp_path / "rollouts.parquet")
        assert {row["state"] for row in table if row["draw"] == live[0].draw} == {"filtered"}

    asyncio.run(main())


def test_the_size_of_a_pack_is_asked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes Arrow a while, and thousands of small packs wait for one row group."""
    asked: list[int] = []

    class Batch:
        @property
        def nbytes(self) -> int:
            asked.append(1)
            return 1

    batches = [Batch() for _ in range(50)]
    left = iter(batches)
    monkeypatch.setattr(rollouts, "rows_of", lambda pack, outcomes: next(left))
    monkeypatch.setattr(rollouts, "pa", SimpleNamespace(Table=SimpleNamespace(from_batches=list)))
    monkeypatch.setattr(rollouts, "_ROW_GROUP_BYTES", 20)
    assert [len(each) for each in rollouts._row_groups([(b"", [])] * 50)] == [20, 20, 10]  # type: ignore[arg-type]
    assert len(asked) == 50


def test_feedback_that_no_utf8_holds_is_written_with_escapes() -> None:
    verdict = ("scored", 1.0, {}, "half a pair: \ud800")
    outcome = Outcome((1, 0), 0, 3, "committed", (0,), "", [verdict], (0,))
    batch = rollouts.rows_of(schema.encode([group(0, 3)]), [outcome])
    assert batch.column("feedback").to_pylist() == ["half a pair: \\ud800"]


def test_an_export_that_fails_leaves_the_table_before_it(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    outcome = Outcome((1, 0), 0, 3, "committed", (0,), "", None, (0,))
    rollouts.write(path, [(schema.encode([group(0, 3)]), [outcome])])

    def broken() -> Any:
        yield schema.encode([group(0, 3)]), [outcome]
        raise JournalError("gone")

    with pytest.raises(JournalError):
        rollouts.write(path, broken())
    assert len(rows(path)) == 1 and [each.name for each in tmp_path.iterdir()] == ["t.parquet"]


def test_a_run_without_rollouts_has_an_empty_table(tmp_path: Path) -> None:
    async def main() -> None:
        assert await Life(tmp_path).queue.export() == 0

    asyncio.run(main())
    assert pq.read_table(tmp_path / "rollouts.parquet").schema.names == rollouts.TABLE.names


@pytest.mark.parametrize("reader", ["polars", "pandas", "duckdb"])
def test_one_line_opens_it(tmp_path: Path, reader: str) -> None:
    if importlib.util.find_spec(reader) is None:
        pytest.skip(f"{reader} is not installed")
    module = importlib.import_module(reader)

    async def main() -> None:
        life = await a_life_until_the_kill(tmp_path)
        await life.queue.export()
        await life.queue.close()

    asyncio.run(main())
    path = str(tmp_path / "rollouts.parquet")
    if reader == "duckdb":
        texts = [row[0] for row in module.sql(f"select components from '{path}' where score > 0").fetchall()]
    else:
        texts = [each for each in module.read_parquet(path)["components"] if isinstance(each, str)]
    assert [json.loads(text) for text in texts] == [{"exact": 1.0}] * 12
