"""Arrows between the rooms of the package run one way."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "nnscaler"
# room -> rooms that nothing in it may import
BARRED = {
    "recompute": ("planner", "runtime", "codegen", "pipeline", "report", "cli"),
    "planner": ("runtime", "codegen", "pipeline", "report", "cli"),
    "pipeline": ("runtime", "codegen", "report", "cli"),
    "codegen": ("runtime", "pipeline", "report", "cli"),
    "runtime": ("planner", "codegen", "pipeline", "report", "cli"),
}


def imported(file: Path) -> set[str]:
    """Modules of this package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.startswith("nnscaler.")}


@pytest.mark.parametrize("room", BARRED)
def test_a_room_does_not_import_what_is_above_it(room):
    for file in (PACKAGE / room).rglob("*.py"):
        rooms = {name.split(".")[1] for name in imported(file)}
        assert not rooms & set(BARRED[room]), file
