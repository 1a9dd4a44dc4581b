"""What the benchmarks share: the machine they ran on, and how their results are written."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
CORES = len(os.sched_getaffinity(0))


def environment() -> dict[str, Any]:
    """Machine, versions and revision that a result holds for."""
    import transformers

    revision = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout
    gpus = torch.cuda.device_count()
    return {
        "device": f"{gpus} x {torch.cuda.get_device_name()}" if gpus else f"CPU, {platform.machine()}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "revision": revision.strip(),
    }


def write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**environment(), **result}, indent=1) + "\n")


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Rows as aligned columns, the first to the left."""
    cells = [list(head), *([f"{x:.4g}" if isinstance(x, float) else str(x) for x in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))) for row in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def print_rows(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints rows of equal keys as a table."""
    print(table(list(rows[0]), [list(row.values()) for row in rows]))


def gpu_milliseconds(function: Callable[[], object], runs: int = 5, warm_up: int = 2) -> float:
    """Median time of a call on the GPU."""
    for _ in range(warm_up):
        function()
    times = []
    for _ in range(runs):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]
