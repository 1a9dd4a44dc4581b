"""Numbers of things, for people."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """As "1 file" or "1,024 files"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
