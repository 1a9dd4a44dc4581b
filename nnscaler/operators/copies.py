"""What the copies of the model, which train on different samples, compute together."""

from __future__ import annotations

from torch import Tensor

from nnscaler.operators.register import register_op
from nnscaler.operators.registry import save_nothing


@register_op("*^ -> *^", saves=save_nothing, among_copies="nnscaler.runtime.copies.average_among_copies")
def average_over_copies(x: Tensor) -> Tensor:
    """The average over all copies of the model of a float tensor of any shape. It has no gradient.

    It is for figures of a whole micro-batch. Where there is only one copy, it is `x`.
    """
    return x.clone()
