"""Attention written out, which all ways to compute it are held against."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nnscaler.kernels.random import dropout as drop
from nnscaler.kernels.random import numbers_of


def written_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None = None,
    slopes: Tensor | None = None,
    documents: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = True,
    window: tuple[int | None, int | None] = (None, None),
    softcap: float | None = None,
    dropout: float = 0.0,
    draws: Tensor | None = None,
    place: Tensor | None = None,
    **_: Tensor,
) -> Tensor:
    """As `nnscaler.operators.attention.attention`, all scores at once and by autograd: [b, l, h, e]."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = query @ key.mT * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    rows, keys = scores.shape[2:]
    after = torch.arange(keys) - torch.arange(keys - rows, keys).unsqueeze(1)
    if slopes is not None:
        scores = scores - slopes.view(-1, 1, 1) * after.abs()
    hidden = (after > 0) if is_causal else torch.zeros_like(after, dtype=torch.bool)
    left, right = window
    if left is not None:
        hidden = hidden | (after < -left)
    if right is not None:
        hidden = hidden | (after > right)
    if documents is not None:
        hidden = hidden | (documents[:, keys - rows :, None] != documents[:, None, :])[:, None]
    scores = scores.masked_fill(hidden, -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(-1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    weights = scores.softmax(3)[..., :keys]
    if dropout:
        weights = drop(weights, dropout, draws, place, numbers_of(weights.shape))
    return (weights @ value).transpose(1, 2)
