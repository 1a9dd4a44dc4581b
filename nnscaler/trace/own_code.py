"""Which lines are the model's own code, rather than torch's or this package's."""

from __future__ import annotations

import re

_MACHINERY = re.compile(r"[/\\](?:torch|nnscaler)[/\\]")


def is_own_code(file: str) -> bool:
    return not _MACHINERY.search(file)


def line_of(file: str, line: int | str) -> str:
    """`file.py:line`."""
    name = re.split(r"[/\\]", file)[-1]
    return f"{name}:{line}"
