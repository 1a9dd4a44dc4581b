"""Attention that drops some of its weights, as torch's `scaled_dot_product_attention` with `dropout_p`, written out."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from nnscaler.kernels import random


def written_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    drop: Callable[[Tensor], Tensor],
) -> Tensor:
    """query [..., h, l, d], key and value [..., k, s, d] -> [..., h, l, d], by all weights at once.

    drop  what is done with the weights [..., h, l, s]
    The other arguments are those of torch's function.
    """
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(attn_mask.logical_not(), -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return drop(scores.softmax(-1)) @ value


def _traced(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool,
    scale: float | None, enable_gqa: bool,
) -> Tensor:  # fmt: skip
    def drop(weights: Tensor) -> Tensor:
        return random.drop(weights, dropout_p, False)

    return written_out(query, key, value, attn_mask, is_causal, scale, enable_gqa, drop)


# What stands for such a call while a model is traced, until it is decomposed.
_library = torch.library.Library("nnscaler", "FRAGMENT")
_library.define(
    "attention_that_drops(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, float dropout_p, bool is_causal, "
    "float? scale, bool enable_gqa) -> Tensor"
)
_library.impl("attention_that_drops", _traced, "CompositeImplicitAutograd")
