"""Whole items into rows by best fit, the longest first: each goes into the row where it leaves least room."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

WINDOW = 1 << 22  # tokens that are sorted by length at a time, and tokens of rows that are not full yet, about

Item = TypeVar("Item", bound=Sized)


def best_fit(items: Iterable[Item], length: int, window: int = WINDOW) -> Iterator[list[Item]]:
    """Rows of items that are `length` long or less in all. Each item is in one row, and none may be longer than that.

    A window of items is placed at a time, so that memory is bounded. A row that is not full waits for later windows,
    unless too many rows have more room.
    """
    window = max(window, 8 * length)
    most = window // length
    rows: dict[int, list[Item]] = {}
    rooms: list[tuple[int, int]] = []  # room and number of each row that is not full, the fullest first
    number, pending, tokens = 0, list[Item](), 0

    def place(item: Item) -> None:
        nonlocal number
        at = bisect_left(rooms, (len(item), -1))
        if at < len(rooms):
            room, row = rooms.pop(at)
        else:
            number += 1
            room, row = length, number
        rows.setdefault(row, []).append(item)
        insort(rooms, (room - len(item), row))

    for item in items:
        pending.append(item)
        tokens += len(item)
        if tokens >= window:
            for each in sorted(pending, key=len, reverse=True):
                place(each)
            pending, tokens = [], 0
            while rooms and (rooms[0][0] == 0 or len(rooms) > most):
                yield rows.pop(rooms.pop(0)[1])
    for each in sorted(pending, key=len, reverse=True):
        place(each)
    yield from rows.values()
