"""Arrows between the rooms of the package run one way, and each file can be read in one sitting."""

from __future__ import annotations

import ast
from pathlib import Path

import networkx
import pytest

PACKAGE = Path(__file__).parents[1] / "nnscaler"
# room -> rooms that nothing in it may import
BARRED = {
    "trace": ("planner", "runtime", "codegen", "pipeline", "report", "cli"),
    "operators": ("planner", "runtime", "codegen", "pipeline", "report", "cli"),
    "recompute": ("planner", "runtime", "codegen", "pipeline", "report", "cli"),
    "planner": ("runtime", "codegen", "pipeline", "report", "cli"),
    "pipeline": ("runtime", "codegen", "report", "cli"),
    "codegen": ("runtime", "pipeline", "report", "cli"),
    "runtime": ("planner", "codegen", "pipeline", "report", "cli"),
    "report": ("runtime", "cli"),
    "profiler": ("planner", "codegen", "pipeline", "report", "cli"),
    "models": ("planner", "codegen", "pipeline", "report", "cli"),
}
WORDS = (
    "annotation",
    "constants",
    "errors",
    "folding",
    "graph",
    "mesh",
    "placement",
    "plan",
    "reshard",
    "shards",
    "sizes",
    "units",
    "schedules",
    "searched",
    "sums",
)  # that all share


def imported(file: Path) -> set[str]:
    """Modules of this package that a file imports, anywhere in it."""
    return imported_by(ast.parse(file.read_text()))


def imported_by(tree: ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.startswith("nnscaler.")}


def test_imports_make_no_circle():
    """Not even imports inside a function, or for type checking alone."""
    names = {".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts): file for file in PACKAGE.rglob("*.py")}
    arrows = networkx.DiGraph()
    for name, file in names.items():
        arrows.add_edges_from((name, other) for other in imported(file) & set(names))
    assert list(networkx.simple_cycles(arrows)) == []


@pytest.mark.parametrize("word", WORDS)
def test_shared_words_import_nothing_above_them(word):
    rooms = {name.split(".")[1] for name in imported(PACKAGE / f"{word}.py")}
    allowed = {*WORDS, "operators", "recompute"}  # units are divided by operators; a plan counts calls at each level
    assert rooms <= allowed


@pytest.mark.parametrize("room", BARRED)
def test_a_room_does_not_import_what_is_above_it(room):
    for file in (PACKAGE / room).rglob("*.py"):
        rooms = {name.split(".")[1] for name in imported(file)}
        assert not rooms & set(BARRED[room]), file


def test_no_file_is_long():
    """500 lines at most, tests too."""
    root = PACKAGE.parent
    files = [
        *root.glob("*.py"),
        *(file for room in ("nnscaler", "tests", "benchmarks") for file in root.glob(f"{room}/**/*.py")),
    ]
    lines = {str(file.relative_to(root)): len(file.read_text().splitlines()) for file in files}
    assert {file: count for file, count in lines.items() if count > 500} == {}
