"""The table in docs/user/mpi.md: what each MPI library has been seen to do, written by test_mpi_features.py."""

from __future__ import annotations

from pathlib import Path

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "user" / "mpi.md"
BEGIN, END = "<!-- made by `make mpi-table` -->", "<!-- end -->"
YES = "yes"
CORNER = "checkpointed in it, restored elsewhere"

Table = dict[str, dict[str, str]]
"""Cells by row and column; rows and columns in their order."""


def read() -> Table:
    """The table as it is; empty before it was written first."""
    lines = [line for line in _between().splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    if not rows:
        return {}
    head, _, *body = rows
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in body}


def write(column: str, cells: dict[str, str], columns: list[str]) -> None:
    """Put one column's cells into the table; rows and columns that it does not have by now are gone."""
    old = read()
    table = {row: {name: old.get(row, {}).get(name, "") for name in columns} | {column: cells[row]} for row in cells}
    lines = [f"| {CORNER} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {row} | {' | '.join(found[name] for name in columns)} |" for row, found in table.items()]
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    DOCUMENT.write_text("\n".join([f"{before}{BEGIN}", *lines, END]) + rest.partition(END)[2])


def _between() -> str:
    text = DOCUMENT.read_text()
    assert BEGIN in text and END in text, f"{DOCUMENT} has no place for the table"
    return text.partition(BEGIN)[2].partition(END)[0]
