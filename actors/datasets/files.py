"""Files of rows: JSON Lines and Parquet. Each yields (line or row number, its columns), from 1."""

import json
from collections.abc import Collection, Iterator, Mapping
from datetime import date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from millrace.core.errors import DataError

Row = tuple[int, Mapping[str, Any] | DataError]  # a row that cannot be read is yielded as its error


def jsonl(path: Path, columns: Collection[str] | None = None) -> Iterator[Row]:
    """One JSON object per line; blank lines are skipped and counted.

    Source: the JSON Lines format, jsonlines.org.

    Args:
        path: a file in UTF-8.
        columns: yield only these; None for all.
    Yields:
        The line's number and its columns, or the DataError that says why it cannot be read.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "sums.jsonl"
    >>> _ = file.write_text('{"prompt": "1+1=", "answer": 2}\\n\\n{"prompt": "2+3=", "answer": 5}\\n')
    >>> list(jsonl(file))
    [(1, {'prompt': '1+1=', 'answer': 2}), (3, {'prompt': '2+3=', 'answer': 5})]
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, _json_row(line, columns)


def _json_row(line: bytes, columns: Collection[str] | None) -> Mapping[str, Any] | DataError:
    try:
        row = json.loads(line.strip())
    except UnicodeDecodeError as caught:
        return DataError(f"not UTF-8 ({caught.reason} at byte {caught.start}); save the file as UTF-8")
    except (json.JSONDecodeError, RecursionError) as caught:
        where = (
            f"{caught.msg} at column {caught.colno}" if isinstance(caught, json.JSONDecodeError) else "nested too deep"
        )
        return DataError(f"not JSON ({where}): {_start(line)}; write one JSON object per line")
    if not isinstance(row, dict):
        return DataError(f"{type(row).__name__} instead of a JSON object: {_start(line)}; write one object per line")
    return row if columns is None else {name: value for name, value in row.items() if name in columns}


def _start(line: bytes) -> str:
    text = line.decode("utf-8", "replace").strip()
    return text if len(text) <= 60 else text[:57] + "..."


def parquet(path: Path, columns: Collection[str] | None = None) -> Iterator[Row]:
    """A Parquet file, batch by batch; dates become ISO 8601 strings, decimals floats.

    Source: the Apache Parquet format, parquet.apache.org, as pyarrow reads it.

    Args:
        path: the file.
        columns: read only these; None for all.
    Yields:
        The row's number and its columns.
    Raises:
        DataError: it is no Parquet file.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "sums.parquet"
    >>> pq.write_table(pa.table({"prompt": ["1+1=", "2+3="], "answer": [2, 5]}), file)
    >>> list(parquet(file, columns=["answer"]))
    [(1, {'answer': 2}), (2, {'answer': 5})]
    """
    try:
        with pq.ParquetFile(path) as file:
            wanted = [name for name in file.schema_arrow.names if columns is None or name in columns]
            number = 0
            for batch in file.iter_batches(batch_size=4096, columns=wanted):
                for row in batch.to_pylist():
                    number += 1
                    yield number, {name: plain(value) for name, value in row.items()}
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as caught:
        raise DataError(f"{path}: not a Parquet file that can be read ({caught}); write it anew") from caught


def plain(value: Any) -> Any:
    """`value` with what JSON has no word for in JSON's words; bytes and the like are returned as they are."""
    match value:
        case str() | bool() | int() | float() | None:
            return value
        case dict():
            return {key: plain(part) for key, part in value.items()}
        case list() | tuple():
            return [plain(part) for part in value]
        case datetime() | date() | time():
            return value.isoformat()
        case Decimal():
            return float(value)
        case _:
            return value
