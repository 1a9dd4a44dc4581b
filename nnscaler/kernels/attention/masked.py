"""Attention with windows and documents by PyTorch's own kernel for the CPU: some rows at a time, each under its mask.

The result is that of torch's `scaled_dot_product_attention` with one mask for all rows, to the last bit, which is what
transformers' models compute. A mask has at most `_MASK` elements in memory, not the sequence squared. Besides inputs
and result, backward needs one number a row, as in `rows`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nnscaler.kernels.attention.asked import Asked
from nnscaler.kernels.documents import Documents

OPTIONS = frozenset({"windows", "documents", "documents with later keys"})
_MASK = 2**22
_ROWS = 256
_TILE = 512  # keys that the kernel takes at a time; from the same borders its sums are the same

_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def attend_under_masks(query: Tensor, key: Tensor, value: Tensor, asked: Asked) -> Tensor:
    """query [b, l, h, d], key and value [b, s, k, d] -> [b, l, h, d]. Of `asked`, the scale and OPTIONS count."""
    documents = None if asked.documents is None else asked.documents.numbers
    # Of what does not lie in one piece along a head, the kernel reads something else.
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    limits = (asked.first, asked.left, asked.right)
    return torch.ops.nnscaler.attention_under_masks(query, key, value, documents, asked.scale, *limits)[0]


@torch.library.custom_op("nnscaler::attention_under_masks", mutates_args=())
def _forward(
    query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None, scale: float, first: int, left: int | None,
    right: int | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    asked = Asked(scale, first, left, right, documents=Documents.of(documents))
    result = torch.empty_like(query, memory_format=torch.contiguous_format)
    sums = query.new_empty((*query.shape[:3],), dtype=torch.promote_types(query.dtype, torch.float32))
    for rows, keys, mask in _blocks(query, key, asked, query.dtype, _TILE):
        k, v = (x[:, keys].transpose(1, 2) for x in (key, value))
        for q, out, total in zip(*(_by_group(x[:, rows], key.shape[2]) for x in (query, result, sums.unsqueeze(-1)))):
            found, found_sums = _attend(q, k, v, attn_mask=mask, scale=scale)
            out.copy_(found)
            total.squeeze(-1).copy_(found_sums)
    return result, sums


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(query.shape), query.new_empty((*query.shape[:3],), dtype=wide)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, scale, first, left, right = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.asked = Asked(scale, first, left, right)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, gradient: Tensor, _: None) -> tuple[Any, ...]:
    """In the type of `sums`: products of 16 bits are slow on many CPUs, and their sums would be rounded in between."""
    query, key, value, documents, result, sums = ctx.saved_tensors
    asked = replace(ctx.asked, documents=Documents.of(documents))
    d_query, d_key, d_value = (torch.zeros(x.shape, dtype=sums.dtype) for x in (query, key, value))
    for rows, keys, mask in _blocks(query, key, asked, sums.dtype, 1):
        k, v = (x[:, keys].transpose(1, 2).to(sums.dtype) for x in (key, value))
        d_k, d_v = (x[:, keys].transpose(1, 2) for x in (d_key, d_value))
        tensors = (x[:, rows].to(sums.dtype) for x in (gradient, query, result))
        parts = (_by_group(x, key.shape[2]) for x in (*tensors, sums[:, rows].unsqueeze(-1), d_query[:, rows]))
        for d_out, q, out, total, d_q in zip(*parts):
            given = d_out, q, k, v, out, total.squeeze(-1)
            found = _attend_backward(*given, 0.0, False, attn_mask=mask, scale=asked.scale)
            for d, part in zip((d_q, d_k, d_v), found):
                d += part
    return d_query.to(query.dtype), d_key.to(key.dtype), d_value.to(value.dtype), *(None,) * 5


_forward.register_autograd(_backward, setup_context=_keep)


def _by_group(x: Tensor, shared: int) -> list[Tensor]:
    """[b, l, h, d] -> [b, k, l, d] for each head of those that share keys: views."""
    return list(x.unflatten(2, (shared, -1)).permute(3, 0, 2, 1, 4))


def _blocks(
    query: Tensor, key: Tensor, asked: Asked, dtype: torch.dtype, tile: int
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Some rows at a time, with the keys that these may see, and the mask [rows, keys] or [b, 1, rows, keys]: 0 where a
    row sees a key, else -inf."""
    rows, keys = query.shape[1], key.shape[1]
    left, right = (keys if side is None else side for side in (asked.left, asked.right))
    seen = min(keys, left + right + 1 + _ROWS + 2 * tile)
    step = max(1, min(_ROWS, _MASK // (seen * (1 if asked.documents is None else len(query)))))
    for start in range(0, rows, step):
        end = min(rows, start + step)
        begin = max(0, asked.first + start - left) // tile * tile
        stop = min(keys, -(-(asked.first + end + right) // tile) * tile)
        some, seen_keys = slice(start, end), slice(begin, max(begin, stop))
        hidden = asked.hidden(some, seen_keys, query.device)
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -math.inf)
        yield some, seen_keys, mask if mask.dim() == 2 else mask.unsqueeze(1)
