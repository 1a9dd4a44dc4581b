"""Attention of a sequence that is split over devices (context parallelism)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from nnscaler.operators.attention import ALL, Window, attention_of_rows, pairs, reach
from nnscaler.runtime import collectives
from nnscaler.runtime.axis import Axis

EVEN = 1.05  # the most work of a device as a multiple of all devices' mean, which is good enough


def attention_along_l(
    axis: Axis,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    documents: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = True,
    window: Window = ALL,
    softcap: float | None = None,
    kernel: str = "auto",
) -> Tensor:
    """`attention` of this device's rows of the query with all keys and values (context parallelism).

    A causal mask gives late rows more work, and a window gives the first rows less. Where that matters, pieces of the
    rows are dealt out to the devices in rounds, so that all have about the same work. They are sent there, and the
    results back.
    """
    rows, keys = query.shape[2], key.shape[2]
    rounds = dealing_rounds(axis.size, rows, keys, reach(is_causal, window))
    pieces = collectives.dealt(axis.size, axis.rank, rounds)
    size = rows // rounds
    begin = keys - rows * axis.size  # the place of the whole query's first row
    if rounds > 1:
        query = collectives.balance(query, axis, dim=2, rounds=rounds)
    found = [
        attention_of_rows(
            part, key, value, begin + piece * size, sinks, slopes, documents, scale, is_causal, window, softcap, kernel
        )
        for part, piece in zip(query.chunk(rounds, 2), pieces)
    ]
    result = torch.cat(found, 1) if rounds > 1 else found[0]
    return collectives.unbalance(result, axis, dim=1, rounds=rounds) if rounds > 1 else result


@functools.cache
def dealing_rounds(devices: int, rows: int, keys: int, limits: Window) -> int:
    """In how many rounds the rows are dealt out to `devices` devices, which have `rows` each. 1: each computes its own.

    It is the smallest number after which no device has much more work than others; or else the one with the least
    difference.
    """
    best, least = 1, _unevenness(devices, rows, keys, limits, 1)
    for rounds in (2, 4, 8):
        if least <= EVEN or rows % rounds:
            break
        found = _unevenness(devices, rows, keys, limits, rounds)
        if found < least:
            best, least = rounds, found
    return best


def _unevenness(devices: int, rows: int, keys: int, limits: Window, rounds: int) -> float:
    """The most work of a device, over the mean of all devices."""
    size, total = rows // rounds, rows * devices
    seen = [pairs(total - i * size, keys, *limits) for i in range(devices * rounds + 1)]  # by all from a piece on
    work = [
        sum(seen[piece] - seen[piece + 1] for piece in collectives.dealt(devices, rank, rounds))
        for rank in range(devices)
    ]
    return max(work) * devices / sum(work)
