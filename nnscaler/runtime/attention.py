"""Attention of a sequence that is split over devices (context parallelism)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nnscaler.kernels import Documents
from nnscaler.operators.attention import ALL, Window, attention_of_rows, dropped_weights, reach
from nnscaler.runtime import collectives
from nnscaler.runtime.axis import Axis
from nnscaler.runtime.dealing import Rows, rows_of, rows_of_one


def attention_along_l(
    axis: Axis,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    documents: Tensor | None = None,
    draws: Tensor | None = None,
    place: Tensor | None = None,
    batches: Tensor | None = None,
    heads: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = True,
    window: Window = ALL,
    softcap: float | None = None,
    kernel: str = "auto",
    document_length: int | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """`attention` of this device's rows of the query with all keys and values (context parallelism).

    The rows are dealt out to the devices, so that all have about the same work. They are sent there, and the results
    back. Each sequence of a batch is dealt out by its own documents, which all devices know.
    """
    # Devices differ in how many calls their rows make. Where backward gathers the weight again, each call's would, but
    # devices must gather equally often: so calls keep these few numbers instead.
    sinks = None if sinks is None else sinks.clone()
    dropped = dropped_weights(dropout, query, key, draws, place, batches, heads)
    limits, options = reach(is_causal, window), (scale, is_causal, window, softcap, kernel)
    if documents is None:
        rows = rows_of_one(key.shape[2])
        return _dealt_out(axis, query, key, value, rows, limits, (sinks, slopes, None, dropped, *options))
    found = []
    known = Documents(documents)
    for i, rows in enumerate(rows_of(known)):
        one = slice(i, i + 1)
        drops = None if dropped is None else replace(dropped, batches=dropped.batches[one])
        given = (sinks, slopes, known.part(one, slice(None)), drops, *options)
        found.append(_dealt_out(axis, query[one], key[one], value[one], rows, limits, given))
    return torch.cat(found)


def _dealt_out(
    axis: Axis,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: Rows,
    limits: Window,
    given: tuple[Any, ...],
) -> Tensor:
    """Attention of sequences with the same documents. `given`: the other arguments."""
    owners = rows.owners(axis.size, query.shape[2], limits)
    size = query.shape[2] * axis.size // len(owners)
    begin = key.shape[2] - query.shape[2] * axis.size  # the place of the whole query's first row
    travels = len(owners) > axis.size
    if travels:
        query = collectives.deal(query, axis, 2, owners)
    found, done = [], 0
    for piece, count in _runs([piece for piece, owner in enumerate(owners) if owner == axis.rank]):
        part = query[:, :, done : done + count * size]
        first = begin + piece * size
        found.append(_of_rows(part, key, value, begin, first, rows, given))
        done += count * size
    result = torch.cat(found, 1) if len(found) > 1 else found[0]
    return collectives.collect(result, axis, 1, owners) if travels else result


def _of_rows(
    query: Tensor, key: Tensor, value: Tensor, begin: int, first: int, rows: Rows, given: tuple[Any, ...]
) -> Tensor:
    """Attention of neighbouring rows, with the documents that they are of. The first of them stands at key `first`, and
    the whole query's first row at key `begin`."""
    sinks, slopes, documents, dropped, *options = given
    if dropped is not None:
        dropped = replace(dropped, start=(first - begin) * dropped.row)
    if documents is not None:
        seen = slice(int(rows.starts[first]), int(rows.ends[first + query.shape[2] - 1]))
        key, value, documents = key[:, :, seen], value[:, :, seen], documents.part(slice(None), seen)
        first -= seen.start
        dropped = dropped and dropped.from_key(seen.start)
    return attention_of_rows(query, key, value, first, sinks, slopes, documents, dropped, *options)


def _runs(pieces: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Neighbours among pieces that rise: the first, and how many."""
    start = 0
    for end in range(1, len(pieces) + 1):
        if end == len(pieces) or pieces[end] != pieces[end - 1] + 1:
            yield pieces[start], end - start
            start = end
