"""The table of benchmarks/README.md, made of the rows in results/: `python -m benchmarks.table` writes it there."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS

README = RESULTS.parent / "README.md"
BEGIN, END = "<!-- rows: made by python -m benchmarks.table -->", "<!-- end of rows -->"


def rows(results: Path = RESULTS) -> list[Mapping[str, Any]]:
    """All rows, ordered by id: P2 before P10, and what has no number last."""
    found = [row for file in sorted(results.glob("*.json")) for row in json.loads(file.read_text())]
    return sorted(found, key=lambda row: _natural(row["id"]))


def _natural(id: str) -> tuple[object, ...]:
    goal = re.match(r"P(\d+)(s?)(?=/|$)", id)
    parts = tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", id))
    return (0, int(goal[1]), goal[2], parts) if goal else (1, 0, "", parts)


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """In Markdown; what was missed is in bold."""
    lines = ["| id | what | value | 95 % interval | target | command |", "|---|---|---|---|---|---|"]
    for row in rows:
        interval = "counted" if row["interval"] is None else " - ".join(f"{bound:.3g}" for bound in row["interval"])
        target = row["target"] or "none"
        if row["reached"] is False:
            target = f"**{target}: missed**"
        what = row["what"].replace("|", "/")
        value = "none" if row["value"] is None else f"{row['value']:.3g}"
        if row["value"] is None:
            interval = row["details"]["why"]
        lines.append(f"| {row['id']} | {what} | {value} | {interval} | {target} | `{row['command']}` |")
    return "\n".join(lines)


def laid_into(text: str, table: str) -> str:
    """The text with the table between its marks.

    >>> print(laid_into(f"a\\n{BEGIN}\\nold\\n{END}\\nb", "new").replace(BEGIN, "<").replace(END, ">"))
    a
    <
    new
    >
    b
    """
    before, _, rest = text.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise ValueError(f"the text has no {BEGIN} before {END}")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def main() -> None:
    """Write it."""
    README.write_text(laid_into(README.read_text(), table(rows())))


if __name__ == "__main__":
    main()
