"""Which device computes which rows of attention along the sequence, so that all have about the same work.

Rows are dealt out in pieces of equal length, the same number to each device. Their work differs: under a causal mask
late rows have more, under a window the first rows have less, and no row has any beyond its document.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nnscaler.kernels import Documents
from nnscaler.operators.attention import Window

EVEN = 1.05  # the most work of a device as a multiple of all devices' mean, which is good enough
MOST_PIECES = 16  # of a device

Ints = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(eq=False)
class Rows:
    """The rows of a sequence, by their documents: two arrays of [s] places, where each row's document begins and
    ends."""

    starts: Ints
    ends: Ints
    _owners: dict[Any, tuple[int, ...]] = field(default_factory=dict)

    @staticmethod
    def of(numbers: Ints) -> Rows:
        """The rows of documents with these numbers [s]; equal numbers are neighbours."""
        edges = np.concatenate([[0], np.flatnonzero(np.diff(numbers)) + 1, [len(numbers)]])
        starts, ends = edges[:-1], edges[1:]
        return Rows(np.repeat(starts, ends - starts), np.repeat(ends, ends - starts))

    def owners(self, devices: int, rows: int, limits: Window) -> tuple[int, ...]:
        """The device of each piece, in order. The pieces are of the last rows, `rows` for each device.

        There are as few pieces as leave no device much more work than others; or, where that is not possible, the
        number that leaves the least difference. One piece a device, in order, are the rows that each device has
        already.

        limits  how many keys before its place a row sees, and how many after it; None: all of its document
        """
        if (devices, rows, limits) not in self._owners:
            self._owners[devices, rows, limits] = self._even(devices, rows, self._seen(rows * devices, limits))
        return self._owners[devices, rows, limits]

    def _even(self, devices: int, rows: int, seen: Ints) -> tuple[int, ...]:
        work = np.concatenate([[0], np.cumsum(seen)])  # of the rows before each
        best, least, pieces = tuple(range(devices)), np.inf, 1
        while pieces <= MOST_PIECES and rows % pieces == 0 and least > EVEN:
            each = np.diff(work[:: rows // pieces])
            owners = deal(each.tolist(), devices) if pieces > 1 else best
            found = np.bincount(owners, each, devices).max() * devices / work[-1]
            if found < least:
                best, least = owners, found
            pieces *= 2
        return best

    def _seen(self, rows: int, limits: Window) -> Ints:
        """How many keys each of the last rows sees."""
        places = np.arange(len(self.starts) - rows, len(self.starts))
        sides = places - self.starts[-rows:], self.ends[-rows:] - 1 - places
        before, after = (side if most is None else np.minimum(side, most) for side, most in zip(sides, limits))
        return before + after + 1


def deal(work: Sequence[int], devices: int) -> tuple[int, ...]:
    """A device for each piece: the piece with most work goes first, to the device that has least so far. Each gets as
    many pieces."""
    owners, loads, room = [0] * len(work), [0] * devices, [len(work) // devices] * devices
    for piece in sorted(range(len(work)), key=lambda piece: -work[piece]):
        owner = min((device for device in range(devices) if room[device]), key=loads.__getitem__)
        owners[piece] = owner
        loads[owner] += work[piece]
        room[owner] -= 1
    return tuple(owners)


def rows_of(documents: Documents) -> list[Rows]:
    """The rows of each sequence."""
    return documents.once("rows", lambda: [Rows.of(numbers) for numbers in documents.on_host])


@functools.lru_cache(8)
def rows_of_one(keys: int) -> Rows:
    """The rows of a sequence that is one document."""
    return Rows.of(np.zeros(keys, np.int64))
