"""What generated code exchanges among the copies of the model in forward."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from nnscaler.runtime.axis import Axis


def average_among_copies(copies: Axis, x: Tensor) -> Tensor:
    """`average_over_copies` of this copy's `x`."""
    result = x.clone()
    dist.all_reduce(result, group=copies.group)
    return result / copies.size
