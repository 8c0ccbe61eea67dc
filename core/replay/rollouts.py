"""The rollouts of a run as a table for people: one row for each, in one Parquet file."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from millrace.core import schema
from millrace.core.replay.journal import Outcome
from millrace.core.schema import Pack

NAME = "rollouts.parquet"
_ROW_GROUP_BYTES = 32 << 20

TABLE = pa.schema(
    [
        ("draw", pa.int64()),
        ("attempt", pa.int32()),
        ("member", pa.int32()),  # of its group
        ("prompt_id", pa.utf8()),
        ("prompt", pa.utf8()),
        ("answer", pa.utf8()),
        ("tokens", pa.list_(pa.int32())),  # of the response
        ("behaviour_logprob", pa.list_(pa.float32())),  # nats, per token
        ("version_first", pa.int32()),  # of the weights that sampled its tokens
        ("version_last", pa.int32()),
        ("finish_reason", pa.utf8()),
        ("seed", pa.int64()),
        ("score", pa.float64()),
        ("verdict", pa.utf8()),
        ("components", pa.utf8()),  # JSON
        ("feedback", pa.utf8()),
        ("state", pa.utf8()),
        ("rule", pa.utf8()),  # that filtered or aged it, or the cause of its failure
        ("steps", pa.list_(pa.int32())),  # that trained it
        ("lag", pa.int32()),  # of its oldest token, in the first of these
    ]
)


def write(path: Path, packs: Iterable[tuple[Pack, Sequence[Outcome]]]) -> int:
    """Write the rollouts of these groups; the file is whole or the one before. Returns the rows.

    Args:
        path: of the table.
        packs: a pack, and the fates of the groups in it; read one after the other.
    """
    part = path.with_name(f"{path.name}.part")
    rows = 0
    try:
        with pq.ParquetWriter(part, TABLE, compression="zstd") as writer:
            for table in _row_groups(packs):
                writer.write_table(table)
                rows += len(table)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return rows


def _row_groups(packs: Iterable[tuple[Pack, Sequence[Outcome]]]) -> Iterator[pa.Table]:
    """Packs put together until they are worth a row group; memory holds no more of them at a time."""
    waiting: list[pa.RecordBatch] = []
    size = 0  # of those, in bytes
    for pack, outcomes in packs:
        waiting.append(rows_of(pack, outcomes))
        size += waiting[-1].nbytes
        if size >= _ROW_GROUP_BYTES:
            yield pa.Table.from_batches(waiting)
            waiting, size = [], 0
    if waiting:
        yield pa.Table.from_batches(waiting)


def rows_of(pack: Pack, outcomes: Sequence[Outcome]) -> pa.RecordBatch:
    """The rollouts of these groups of a pack, group by group."""
    groups = schema.read(pack).take(pa.array([outcome.location[1] for outcome in outcomes], pa.int64()))
    members = groups.column("rollouts")
    sizes = members.value_lengths().to_numpy()
    group = np.repeat(np.arange(len(outcomes)), sizes)
    member = np.concatenate([np.arange(size) for size in sizes]) if len(sizes) else np.empty(0, np.int64)
    rollouts = members.flatten()
    prompt = groups.column("prompt").take(pa.array(group))
    first, last = _versions(rollouts.field("versions"))
    columns = {
        "draw": groups.column("draw").take(pa.array(group)),
        "attempt": groups.column("attempt").take(pa.array(group)),
        "member": pa.array(member, pa.int32()),
        "prompt_id": prompt.field("id"),
        "prompt": prompt.field("text"),
        "answer": prompt.field("answer"),
        "tokens": rollouts.field("tokens"),
        "behaviour_logprob": rollouts.field("behaviour_logprob"),
        "version_first": first,
        "version_last": last,
        "finish_reason": rollouts.field("finish_reason"),
        "seed": rollouts.field("seed"),
        **_facts(outcomes, group.tolist(), member.tolist()),
    }
    return pa.RecordBatch.from_arrays([columns[name] for name in TABLE.names], schema=TABLE)


def _versions(column: pa.ListArray) -> tuple[pa.Array, pa.Array]:
    """Of the first and of the last token; null where there is none."""
    offsets, versions = column.offsets.to_numpy(), column.values.field("version").to_numpy()
    some = offsets[1:] > offsets[:-1]
    ends = []
    for at in (offsets[:-1], offsets[1:] - 1):
        values = np.zeros(len(some), np.int32)
        values[some] = versions[at[some]]
        ends.append(pa.array(values, mask=~some))
    return ends[0], ends[1]


def _facts(outcomes: Sequence[Outcome], group: Sequence[int], member: Sequence[int]) -> dict[str, pa.Array]:
    """What the ledger knows, per rollout."""
    verdicts = [list(outcome.verdicts) if outcome.verdicts is not None else [] for outcome in outcomes]
    own = [
        verdicts[g][m] if m < len(verdicts[g]) else (None, None, None, None) for g, m in zip(group, member, strict=True)
    ]
    lags = [outcomes[g].lags[m] if m < len(outcomes[g].lags) else None for g, m in zip(group, member, strict=True)]
    components = [json.dumps(parts) if parts is not None else None for _, _, parts, _ in own]
    return {
        "score": pa.array([score for _, score, _, _ in own], pa.float64()),
        "verdict": pa.array([kind for kind, _, _, _ in own], pa.utf8()),
        "components": pa.array(components, pa.utf8()),
        "feedback": pa.array([_encodable(feedback) for _, _, _, feedback in own], pa.utf8()),
        "state": pa.array([outcomes[g].state for g in group], pa.utf8()),
        "rule": pa.array([outcomes[g].rule or None for g in group], pa.utf8()),
        "steps": pa.array([list(outcomes[g].steps) for g in group], pa.list_(pa.int32())),
        "lag": pa.array(lags, pa.int32()),
    }


def _encodable(text: str | None) -> str | None:
    """A judge may quote what no UTF-8 holds: half a surrogate pair, out of a model's JSON."""
    return text if text is None else text.encode(errors="backslashreplace").decode()
