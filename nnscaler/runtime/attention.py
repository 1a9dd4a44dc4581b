"""Attention of a sequence that is split over devices (context parallelism)."""

from __future__ import annotations

import torch
from torch import Tensor

from nnscaler.kernels import attend, attend_to_prefix
from nnscaler.runtime import collectives
from nnscaler.runtime.axes import Axis


def attention_along_l(
    axis: Axis,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None = None,
    is_causal: bool = True,
    kernel: str = "auto",
) -> Tensor:
    """`attention` of this device's rows of the query with all keys and values (context parallelism).

    A causal mask gives late rows more work: of 2n pieces of the sequence, which lie on n devices in order, each device
    computes the i-th and the i-th last, so that all have as much to do. The query's rows travel there, and back.
    """
    if not is_causal:
        return attend(query, key, value, scale, False, kernel)
    rows = query.shape[2]
    if rows % 2:
        return attend_to_prefix(query, key, value, scale, kernel, (axis.rank + 1) * rows)
    pieces = collectives.balance(query, axis, dim=2).chunk(2, 2)
    ends = [(axis.rank + 1) * rows // 2, (2 * axis.size - axis.rank) * rows // 2]
    out = [attend_to_prefix(piece, key, value, scale, kernel, end) for piece, end in zip(pieces, ends)]
    return collectives.unbalance(torch.cat(out, 1), axis, dim=1)
