"""Attention in plain PyTorch, with every option, on any device: some rows at a time.

The faster kernels are compared with this. At most `_SCORES` scores are in memory at once. Besides inputs and result,
backward needs one number a row: the logarithm of the sum in its softmax.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nnscaler.kernels.attention.asked import Asked, Dropped
from nnscaler.kernels.documents import Documents
from nnscaler.kernels.random import kept_at_once, scale_of

_SCORES = 2**22


def attend_by_rows(query: Tensor, key: Tensor, value: Tensor, asked: Asked) -> Tensor:
    """query [b, l, h, d], key [b, s, k, d], value [b, s, k, e] -> [b, l, h, e]; scores are fp32, or fp64 for fp64
    inputs."""
    limits = (asked.first, asked.left, asked.right)
    documents = None if asked.documents is None else asked.documents.numbers
    tensors = (query, key, value, asked.sinks, asked.slopes, documents)
    dropped = asked.dropped
    numbers = [] if dropped is None else [dropped.draws, dropped.place, dropped.batches, dropped.heads]
    drops = (0.0, 0, 0) if dropped is None else (dropped.p, dropped.row, dropped.start)
    return torch.ops.nnscaler.attention_by_rows(*tensors, numbers, asked.scale, asked.softcap, *limits, *drops)[0]


@torch.library.custom_op("nnscaler::attention_by_rows", mutates_args=())
def _forward(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, slopes: Tensor | None,
    documents: Tensor | None, numbers: Sequence[Tensor], scale: float, softcap: float | None, first: int,
    left: int | None, right: int | None, p: float, row: int, start: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dropped = _dropped(numbers, p, row, start)
    asked = Asked(scale, first, left, right, softcap, sinks, slopes, Documents.of(documents), dropped)
    call = _Call(query, key, value, asked)
    result = query.new_empty((*query.shape[:3], value.shape[3]))
    sums = query.new_empty((query.shape[0], query.shape[2], query.shape[1]), dtype=call.dtype)
    for rows, keys in call.chunks():
        scores, _ = call.scores(rows, keys)
        total = scores.logsumexp(-1, keepdim=True)
        if sinks is not None:
            total = torch.logaddexp(total, call.by_head(sinks))
        weights = torch.exp(scores - total)
        if dropped is not None:
            weights *= call.kept(dropped, rows, keys)
        result[:, rows] = call.ungrouped(_of_each(weights, call.value[:, :, keys])).to(result.dtype)
        sums[:, :, rows] = total.flatten(1, 2).squeeze(-1)
    return result, sums


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(query.dtype, torch.float32)
    batch, rows, heads, _size = query.shape
    sums = query.new_empty((batch, heads, rows), dtype=wide)
    return query.new_empty((batch, rows, heads, value.shape[3])), sums


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, numbers, scale, softcap, first, left, right, p, row, start = inputs
    ctx.save_for_backward(*tensors, *output, *numbers)
    ctx.asked = Asked(scale, first, left, right, softcap)
    ctx.drops = p, row, start
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, gradient: Tensor, _: None) -> tuple[Any, ...]:
    query, key, value, sinks, slopes, documents, result, sums, *numbers = ctx.saved_tensors
    dropped = _dropped(numbers, *ctx.drops)
    asked = replace(ctx.asked, sinks=sinks, slopes=slopes, documents=Documents.of(documents), dropped=dropped)
    call = _Call(query, key, value, asked)
    d_query, d_key, d_value = (torch.zeros_like(x) for x in (call.query, call.key, call.value))
    d_sinks, d_slopes = (None if x is None else torch.zeros_like(x, dtype=call.dtype) for x in (sinks, slopes))
    for rows, keys in call.chunks():
        scores, capped = call.scores(rows, keys)
        given = call.grouped(gradient[:, rows])
        total = call.grouped(sums[:, :, rows].transpose(1, 2).unsqueeze(-1))
        weights = torch.exp(scores - total)
        # Each weight's gradient beside the mean of them all, which the softmax takes away.
        mean = (given * call.grouped(result[:, rows])).sum(-1, keepdim=True)
        d_weights = _of_each(given, call.value[:, :, keys].mT)
        if dropped is None:
            d_value[:, :, keys] += _of_all(weights, given)
        else:
            kept = call.kept(dropped, rows, keys)
            d_value[:, :, keys] += _of_all(weights * kept, given)
            d_weights *= kept
        d_scores = weights * (d_weights - mean)
        if d_sinks is not None:
            d_sinks -= (torch.exp(call.by_head(sinks) - total) * mean).sum((0, 3, 4)).flatten()
        if d_slopes is not None:
            d_slopes -= (d_scores * call.distance(rows, keys)).sum((0, 3, 4)).flatten()
        if capped is not None:
            d_scores *= 1 - capped.square()
        d_scores *= call.asked.scale
        d_query[:, :, :, rows] = _of_each(d_scores, call.key[:, :, keys])
        d_key[:, :, keys] += _of_all(d_scores, call.query[:, :, :, rows])
    found = [call.ungrouped(d_query), d_key.transpose(1, 2), d_value.transpose(1, 2), d_sinks, d_slopes]
    kinds = (query, key, value, sinks, slopes)
    without = None, [None for _ in numbers], *(None,) * 8
    return *(x if x is None else x.to(kind.dtype) for x, kind in zip(found, kinds)), *without


def _dropped(numbers: Sequence[Tensor], p: float, row: int, start: int) -> Dropped | None:
    """What `numbers` (draws, place, batches, heads) say together with the rest; None: nothing is dropped."""
    if not numbers:
        return None
    draws, place, batches, heads = numbers
    return Dropped(p, draws, place, batches, heads, row, start)


_forward.register_autograd(_backward, setup_context=_keep)


@dataclass
class _Call:
    """The tensors of a call, in the type of the scores, with heads before places.

    query [b, k, g, l, d] with g query heads for each key-value head, key [b, k, s, d], value [b, k, s, e]
    """

    query: Tensor
    key: Tensor
    value: Tensor
    asked: Asked

    def __post_init__(self) -> None:
        self.dtype = torch.promote_types(self.query.dtype, torch.float32)
        self.groups = self.query.shape[2] // self.key.shape[2]
        self.query = self.grouped(self.query)
        self.key, self.value = (x.transpose(1, 2).to(self.dtype) for x in (self.key, self.value))

    def grouped(self, x: Tensor) -> Tensor:
        """[b, l, h, d] -> [b, k, g, l, d]"""
        return x.to(self.dtype).unflatten(2, (-1, self.groups)).movedim(1, 3)

    def ungrouped(self, x: Tensor) -> Tensor:
        """[b, k, g, l, d] -> [b, l, h, d]"""
        return x.movedim(3, 1).flatten(2, 3)

    def by_head(self, x: Tensor) -> Tensor:
        """[h] -> [k, g, 1, 1]"""
        return x.to(self.dtype).view(-1, self.groups, 1, 1)

    def chunks(self) -> Iterator[tuple[slice, slice]]:
        """Some rows at a time, with the keys that these may see."""
        b, k, g, rows, _ = self.query.shape
        keys, asked = self.key.shape[2], self.asked
        left, right = (keys if side is None else side for side in (asked.left, asked.right))
        seen = min(keys, left + right + 1)
        step = max(1, min(_SCORES // (b * k * g * seen), seen))
        for start in range(0, rows, step):
            end = min(rows, start + step)
            begin = max(0, asked.first + start - left)
            yield slice(start, end), slice(begin, max(begin, min(keys, asked.first + end + right)))

    def scores(self, rows: slice, keys: slice) -> tuple[Tensor, Tensor | None]:
        """[b, k, g, rows, keys]: the scores, -inf where a row does not see a key; and the tanh of scores before a
        cap."""
        asked, capped = self.asked, None
        scores = _of_each(self.query[:, :, :, rows], self.key[:, :, keys].mT) * asked.scale
        if asked.softcap is not None:
            capped = torch.tanh(scores / asked.softcap)
            scores = capped * asked.softcap
        if asked.slopes is not None:
            scores = scores - self.by_head(asked.slopes) * self.distance(rows, keys)
        hidden = asked.hidden(rows, keys, scores.device)
        if hidden.dim() == 3:
            hidden = hidden[:, None, None]
        return scores.masked_fill(hidden, -math.inf), capped

    def kept(self, dropped: Dropped, rows: slice, keys: slice) -> Tensor:
        """By what weights are multiplied: [b, k, g, rows, keys]."""
        by_row = torch.arange(rows.start, rows.stop, device=self.query.device).unsqueeze(1) * dropped.row
        heads = dropped.batches.view(-1, 1, 1, 1, 1) + dropped.heads.view(-1, self.groups, 1, 1)
        numbers = heads + (by_row + self.others(keys) + dropped.start)
        stays = kept_at_once(dropped.p, dropped.draws, dropped.place, numbers)
        return stays * scale_of(dropped.p, dropped.draws, self.dtype)

    def distance(self, rows: slice, keys: slice) -> Tensor:
        """[rows, keys]"""
        return (self.places(rows) - self.others(keys)).abs().to(self.dtype)

    def places(self, rows: slice) -> Tensor:
        """[rows, 1]: the places of the rows among the keys."""
        start, end = (self.asked.first + at for at in (rows.start, rows.stop))
        return torch.arange(start, end, device=self.query.device).unsqueeze(1)

    def others(self, keys: slice) -> Tensor:
        """[1, keys]"""
        return torch.arange(keys.start, keys.stop, device=self.query.device).unsqueeze(0)


def _of_each(x: Tensor, y: Tensor) -> Tensor:
    """[b, k, g, l, m] times [b, k, m, n], of each group: [b, k, g, l, n]. Broadcast, torch would copy `y` for each."""
    return (x.flatten(2, 3) @ y).unflatten(2, x.shape[2:4])


def _of_all(x: Tensor, y: Tensor) -> Tensor:
    """[b, k, g, l, m] turned, times [b, k, g, l, n], summed over the groups: [b, k, m, n]."""
    return x.flatten(2, 3).mT @ y.flatten(2, 3)
