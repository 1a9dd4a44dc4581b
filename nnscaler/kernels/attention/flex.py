"""PyTorch's flex_attention: a compiler writes a kernel for the options of a call."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from nnscaler.kernels.attention.asked import Asked

KINDS = 1024  # of calls that are compiled for, at most


def run(q: Tensor, k: Tensor, v: Tensor, asked: Asked) -> Tensor:
    """query [b, l, h, d], key [b, s, k, d], value [b, s, k, e] -> [b, l, h, e]"""
    grouped = q.shape[2] != k.shape[2]
    attend = _compiled() if q.is_cuda else flex_attention
    options: dict[str, Any] = {"return_aux": AuxRequest(lse=True)} if asked.sinks is not None else {}
    # Each kind of layer, and each size, is compiled for. Beyond its limit torch would hold all scores in memory.
    with torch._dynamo.config.patch(recompile_limit=KINDS, accumulated_recompile_limit=KINDS):
        found = attend(
            *(x.transpose(1, 2) for x in (q, k, v)), score_mod=_changed_scores(asked), scale=asked.scale,
            block_mask=_mask(asked, q.shape[1], k.shape[1], q.device), enable_gqa=grouped, **options,
        )  # fmt: skip
    if asked.sinks is None:
        return found.transpose(1, 2)
    result, aux = found
    # A sink takes its part of the softmax's sum: all else keeps exp(sum) of exp(sum) + exp(sink).
    kept = torch.sigmoid(aux.lse.float() - asked.sinks.float().view(1, -1, 1))
    return (result * kept.unsqueeze(-1).to(result.dtype)).transpose(1, 2)


@functools.cache
def _compiled() -> Any:
    return torch.compile(flex_attention)


def _changed_scores(asked: Asked) -> Any:
    cap, slopes, first = asked.softcap, asked.slopes, asked.first
    if cap is None and slopes is None:
        return None

    def change(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        if cap is not None:
            score = cap * torch.tanh(score / cap)
        if slopes is not None:
            score = score - slopes[head] * (row + first - key).abs()
        return score

    return change


def _mask(asked: Asked, rows: int, keys: int, device: torch.device) -> BlockMask | None:
    if asked.documents is None:
        return _mask_of_places(asked.first, asked.left, asked.right, rows, keys, device)
    given = asked.first, asked.left, asked.right
    numbers = asked.documents.numbers

    def make() -> BlockMask:  # of a copy: what is kept may not hold the numbers' own memory
        return _block_mask(*given, numbers.clone(), rows, keys, device)

    return asked.documents.once(("mask", *given, rows), make)


@functools.lru_cache(16)
def _mask_of_places(
    first: int, left: int | None, right: int | None, rows: int, keys: int, device: torch.device
) -> BlockMask | None:
    """The part of a mask that does not depend on documents. All layers and steps share it."""
    return None if left is None and right is None else _block_mask(first, left, right, None, rows, keys, device)


def _block_mask(
    first: int, left: int | None, right: int | None, documents: Tensor | None, rows: int, keys: int,
    device: torch.device,
) -> BlockMask:  # fmt: skip
    def seen(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        place = row + first
        found = key >= 0
        if left is not None:
            found = found & (key >= place - left)
        if right is not None:
            found = found & (key <= place + right)
        if documents is not None:
            found = found & (documents[batch, place] == documents[batch, key])
        return found

    batch = None if documents is None else documents.shape[0]
    return create_block_mask(seen, batch, None, rows, keys, device, _compile=device.type == "cuda")
