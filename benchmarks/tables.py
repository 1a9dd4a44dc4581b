"""How tables and texts of README files are written from results."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from typing import Any

from benchmarks.measure import RESULTS


def rst_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A simple table of reStructuredText."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    line = "  ".join("=" * width for width in widths)

    def cells(row: Sequence[str]) -> str:
        return "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()

    return "\n".join([line, cells(head), line, *map(cells, rows), line])


def read(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return result


def read_if_there(name: str) -> dict[str, Any] | None:
    """The result; None: it was not measured yet."""
    return read(name) if (RESULTS / name).exists() else None


def title(text: str) -> str:
    return f"{text}\n{'=' * len(text)}"


def paragraph(text: str) -> str:
    return textwrap.fill(text, 120)


def compared(predicted: float, measured: float, unit: str, digits: int) -> str:
    return f"{predicted:.{digits}f} / {measured:.{digits}f} {unit} = {predicted / measured:.2f}"
