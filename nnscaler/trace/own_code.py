"""Which lines are the model's own code, rather than torch's or this package's."""

from __future__ import annotations

import re
from typing import Any

_MACHINERY = re.compile(r"[/\\](?:torch|nnscaler)[/\\]")


def is_own_code(file: str) -> bool:
    return not _MACHINERY.search(file)


def line_of(file: str, line: int | str) -> str:
    """`file.py:line`."""
    name = re.split(r"[/\\]", file)[-1]
    return f"{name}:{line}"


def source_of(meta: dict[str, Any]) -> str:
    """`file.py:line` of the innermost frame of the model's own code, from what torch.export notes of a node. What
    torch.fx has generated is no file."""
    frames = re.findall(r'File "((?!<eval_with_key>)[^"]+)", line (\d+)', meta.get("stack_trace") or "")
    own = [frame for frame in frames if is_own_code(frame[0])] or frames
    return line_of(*own[-1]) if own else ""
