"""Whole items into rows by best fit: each goes where it leaves least room, the longest first."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

WINDOW = 1 << 22  # tokens that are sorted by length at a time, and tokens of rows that are not full yet, about

Item = TypeVar("Item", bound=Sized)


def best_fit(items: Iterable[Item], length: int, window: int = WINDOW) -> Iterator[list[Item]]:
    """Rows of items that have `length` or less together, in which each item is once. None may be longer.

    Items are taken up a window at a time, so that memory is bounded. A row that is not full waits for later windows, as
    long as there are not more rows with more room.
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
    for row in sorted(rows):
        yield rows[row]
