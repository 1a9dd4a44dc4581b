"""Numbers of things, for people."""

from __future__ import annotations


def counted(number: int, noun: str, plural: str = "") -> str:
    """As "1 file" or "1,024 files". `plural`: where it is another than with an s."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
