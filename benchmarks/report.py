"""How benchmarks show what they measured: a table to read, and JSON to keep."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

CORES = len(os.sched_getaffinity(0))


def print_table(rows: list[dict[str, Any]]) -> None:
    """Columns are the keys of the first row; all but the first are right-aligned."""
    cells = [list(rows[0]), *([f"{value}" for value in row.values()] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    for row in cells:
        columns = zip(row, widths)
        print("  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(columns)))


def write_json(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
