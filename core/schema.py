"""The Arrow schema of a group: at once wire format, journal format and the user's data.

A *pack* is some groups as bytes: an eight-byte mark with the schema's version, then one Arrow record batch
in IPC format, one row per group. Its log-probabilities and tokens are read in place, without a copy. Packs made here
are Arrow buffers, which Ray carries beside its pickles: whoever receives one reads it where Ray put it.

Per token it holds 4 bytes of id and 4 of log-probability; versions are runs, and `sampled` is absent where
every token was sampled.
"""

import json
from collections.abc import Sequence
from itertools import chain, pairwise
from typing import TypeAlias

import msgspec
import numpy as np
import pyarrow as pa

from millrace.core import memory
from millrace.core.errors import DataError
from millrace.core.types import Group, GroupId, Prompt, Rollout, VersionRun

SCHEMA_VERSION = 1
MARK = b"millrac" + bytes([SCHEMA_VERSION])
Pack: TypeAlias = bytes | pa.Buffer
Run: TypeAlias = tuple[int, int, int]  # version, start, end

_RUN = pa.struct([("version", pa.int32()), ("start", pa.int32()), ("end", pa.int32())])
_PROMPT = pa.struct(
    [
        ("id", pa.utf8()),
        ("text", pa.utf8()),
        ("tokens", pa.list_(pa.int32())),
        ("answer", pa.utf8()),
        ("row", pa.utf8()),  # JSON
    ]
)
_ROLLOUT = pa.struct(
    [
        ("tokens", pa.list_(pa.int32())),
        ("sampled", pa.list_(pa.bool_())),  # null: all of them
        ("behaviour_logprob", pa.list_(pa.float32())),
        ("versions", pa.list_(_RUN)),
        ("finish_reason", pa.utf8()),
        ("seed", pa.int64()),
    ]
)
SCHEMA = pa.schema(
    [
        ("draw", pa.int64()),
        ("attempt", pa.int32()),
        ("lease_epoch", pa.int64()),
        ("prompt", _PROMPT),
        ("rollouts", pa.list_(_ROLLOUT)),
    ]
)
_named = tuple.__new__  # half the time of the class's own
_HEAD_BYTES, _END_BYTES = SCHEMA.serialize().size, 8  # of an Arrow stream, before and after its batches


class GroupHeader(msgspec.Struct, frozen=True, kw_only=True):
    """What the ledger reads of a group, without its tokens."""

    id: GroupId
    lease_epoch: int
    n: int
    tokens: int  # generated, of all rollouts
    oldest_version: int
    runs: tuple[tuple[Run, ...], ...]  # per rollout, as VersionRun


def _offsets(lengths: Sequence[int]) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int32))


def _flat(parts: Sequence[np.ndarray], dtype: type) -> pa.Array:
    kind = np.dtype(dtype)
    if not all(part.dtype == kind for part in parts):
        return pa.array(np.concatenate(parts), type=pa.from_numpy_dtype(kind))  # what does not fit is refused
    values = memory.buffer(kind.itemsize * sum(map(len, parts)))
    if parts:
        np.concatenate(parts, out=np.frombuffer(values, kind))
    return pa.Array.from_buffers(pa.from_numpy_dtype(kind), len(values) // kind.itemsize, [None, values])


def _struct(columns: Sequence[pa.Array], kind: pa.StructType) -> pa.Array:
    return pa.StructArray.from_arrays(list(columns), fields=list(kind))


def _sampled(rollouts: Sequence[Rollout]) -> pa.Array:
    """Null where every token was sampled, which is the rule."""
    parts = [r.sampled_T for r in rollouts]
    if not parts or np.concatenate(parts).all():
        none, empty = np.zeros(len(parts) + 1, np.int32), pa.array([], pa.bool_())
        return pa.ListArray.from_arrays(pa.array(none), empty, mask=pa.array(np.ones(len(parts), np.bool_)))
    full = [bool(part.all()) for part in parts]
    told = [part[:0] if skip else part for part, skip in zip(parts, full, strict=True)]
    lengths = [len(part) for part in told]
    return pa.ListArray.from_arrays(_offsets(lengths), pa.array(np.concatenate(told)), mask=pa.array(full))


def _versions(rollouts: Sequence[Rollout]) -> pa.Array:
    numbers = chain.from_iterable(chain.from_iterable([r.versions for r in rollouts]))
    runs = np.fromiter(numbers, np.int32).reshape(-1, 3)
    values = _struct([pa.array(np.ascontiguousarray(runs[:, i])) for i in range(3)], _RUN)
    return pa.ListArray.from_arrays(_offsets([len(r.versions) for r in rollouts]), values)


def encode(groups: Sequence[Group]) -> Pack:
    """Pack groups. Verdicts are not part of a pack: the queue holds them beside it."""
    prompts = [group.prompt for group in groups]
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    lengths = _offsets([len(r.tokens_T) for r in rollouts])
    prompt = _struct(
        [
            pa.array([p.id for p in prompts], pa.utf8()),
            pa.array([p.text for p in prompts], pa.utf8()),
            pa.ListArray.from_arrays(
                _offsets([len(p.tokens_P) for p in prompts]), _flat([p.tokens_P for p in prompts], np.int32)
            ),
            pa.array([p.answer for p in prompts], pa.utf8()),
            pa.array([json.dumps(p.row) if p.row else None for p in prompts], pa.utf8()),
        ],
        _PROMPT,
    )
    members = _struct(
        [
            pa.ListArray.from_arrays(lengths, _flat([r.tokens_T for r in rollouts], np.int32)),
            _sampled(rollouts),
            pa.ListArray.from_arrays(lengths, _flat([r.behaviour_logprob_T for r in rollouts], np.float32)),
            _versions(rollouts),
            pa.array([r.finish_reason for r in rollouts], pa.utf8()),
            pa.array([r.seed for r in rollouts], pa.int64()),
        ],
        _ROLLOUT,
    )
    batch = pa.RecordBatch.from_arrays(
        [
            pa.array([g.id.draw for g in groups], pa.int64()),
            pa.array([g.id.attempt for g in groups], pa.int32()),
            pa.array([g.lease_epoch for g in groups], pa.int64()),
            prompt,
            pa.ListArray.from_arrays(_offsets([len(g.rollouts) for g in groups]), members),
        ],
        schema=SCHEMA,
    )
    return _write(batch)


def _write(batch: pa.RecordBatch) -> Pack:
    """In one copy: behind a stream's schema, whose last bytes then become the mark."""
    end = _HEAD_BYTES + pa.ipc.get_record_batch_size(batch)
    stream = memory.buffer(end + _END_BYTES)
    with pa.FixedSizeBufferWriter(stream) as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
        writer.write_batch(batch)
    first = _HEAD_BYTES - len(MARK)
    memoryview(stream).cast("B")[first:_HEAD_BYTES] = MARK
    return stream[first:end]


def read(pack: Pack) -> pa.RecordBatch:
    """The record batch of a pack, in place.

    Raises:
        DataError: the bytes are no pack, or one of another schema version.
    """
    mark = bytes(pack[:8])
    if mark != MARK:
        raise DataError(
            f"these {len(pack)} bytes are no pack of schema version {SCHEMA_VERSION}: they begin with {mark!r}; "
            "all processes of a run must have the same version of millrace"
        )
    return pa.ipc.read_record_batch(pa.py_buffer(pack)[8:], SCHEMA)


def _list(array: pa.ListArray) -> tuple[np.ndarray, pa.Array]:
    """Offsets into, and all the values of, a list column."""
    return array.offsets.to_numpy(), array.values


def decode(pack: Pack) -> list[Group]:
    """The groups of a pack; their arrays are read-only views of its bytes."""
    batch = read(pack)
    members, table = _list(batch.column("rollouts"))
    rollouts = _rollouts(table)
    prompts = _prompts(batch.column("prompt"))
    ids = zip(batch.column("draw").to_pylist(), batch.column("attempt").to_pylist(), strict=True)
    return [
        Group(
            id=GroupId(*key),
            prompt=prompts[i],
            rollouts=tuple(rollouts[members[i] : members[i + 1]]),
            lease_epoch=epoch,
        )
        for i, (key, epoch) in enumerate(zip(ids, batch.column("lease_epoch").to_pylist(), strict=True))
    ]


def _prompts(column: pa.StructArray) -> list[Prompt]:
    offsets, values = _list(column.field("tokens"))
    tokens = values.to_numpy()
    texts = (column.field(name).to_pylist() for name in ("id", "text", "answer", "row"))
    return [
        Prompt(
            id=key,
            text=text,
            tokens_P=tokens[offsets[i] : offsets[i + 1]],
            answer=answer,
            row=json.loads(row) if row else {},
        )
        for i, (key, text, answer, row) in enumerate(zip(*texts, strict=True))
    ]


def _runs(column: pa.ListArray) -> list[tuple[Run, ...]]:
    """Of each rollout."""
    offsets, values = _list(column)
    runs = list(zip(*(values.field(name).to_numpy().tolist() for name in ("version", "start", "end")), strict=True))
    return [tuple(runs[start:end]) for start, end in pairwise(offsets.tolist())]


def _rollouts(table: pa.StructArray) -> list[Rollout]:
    ends, ids = _list(table.field("tokens"))
    offsets, tokens = ends.tolist(), ids.to_numpy()
    # Both columns are written with the same offsets, but a slice may have moved one of them.
    ends, values = _list(table.field("behaviour_logprob"))
    at, logprobs = ends.tolist(), values.to_numpy()
    sampled = table.field("sampled")
    some = sampled.to_pylist() if sampled.null_count < len(sampled) else None
    all_T = np.ones(max((end - start for start, end in pairwise(offsets)), default=0), np.bool_)
    all_T.flags.writeable = False
    whole = {length: all_T[:length] for length in {end - start for start, end in pairwise(offsets)}}
    runs = _runs(table.field("versions"))
    reasons = table.field("finish_reason").to_pylist()
    seeds = table.field("seed").to_pylist()
    out = []
    for i in range(len(table)):
        start, end = offsets[i], offsets[i + 1]
        given = some[i] if some is not None else None
        out.append(
            Rollout(
                tokens_T=tokens[start:end],
                sampled_T=whole[end - start] if given is None else np.array(given, np.bool_),
                behaviour_logprob_T=logprobs[at[i] : at[i + 1]],
                versions=tuple([_named(VersionRun, run) for run in runs[i]]),
                finish_reason=reasons[i],
                seed=seeds[i],
            )
        )
    return out


def headers(pack: Pack) -> list[GroupHeader]:
    """What the ledger needs of every group of a pack."""
    batch = read(pack)
    members, table = _list(batch.column("rollouts"))
    offsets = table.field("tokens").offsets.to_numpy().tolist()
    runs = _runs(table.field("versions"))
    draws, attempts, epochs = (batch.column(c).to_pylist() for c in ("draw", "attempt", "lease_epoch"))
    out = []
    for i, (start, end) in enumerate(pairwise(members.tolist())):
        group = tuple(runs[start:end])
        out.append(
            GroupHeader(
                id=GroupId(draws[i], attempts[i]),
                lease_epoch=epochs[i],
                n=end - start,
                tokens=offsets[end] - offsets[start],
                oldest_version=min([run[0] for rollout in group for run in rollout], default=-1),
                runs=group,
            )
        )
    return out


def select(rows: Sequence[tuple[Pack, int]]) -> Pack:
    """A pack of the named rows of other packs, in the order given. Neighbours are copied together, a whole not at all.

    >>> pack = encode([])
    >>> len(select([])) == len(pack)
    True
    """
    opened: dict[int, pa.RecordBatch] = {}
    runs: list[list[int]] = []  # pack, first row, rows
    for pack, row in rows:
        if runs and runs[-1][0] == id(pack) and runs[-1][1] + runs[-1][2] == row:
            runs[-1][2] += 1
            continue
        if id(pack) not in opened:
            opened[id(pack)] = read(pack)
        runs.append([id(pack), row, 1])
    if not runs:
        return encode([])
    if len(runs) == 1 and runs[0][1:] == [0, opened[runs[0][0]].num_rows]:
        return rows[0][0]
    slices = [opened[key].slice(first, many) for key, first, many in runs]
    return _write(pa.concat_batches(slices) if len(slices) > 1 else slices[0])
