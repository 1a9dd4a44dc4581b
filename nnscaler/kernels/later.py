"""Products of which backward computes the gradient of the weight later: y = x W^T.

What that gradient is computed from, x and the gradient of y, comes out of backward as if it were the gradients of two
more tensors that the product takes, the places of a `Weight`. So what is compiled around the product remains a function
without side effects, and what it computes again for backward is not computed a third time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Weight(NamedTuple):
    """A weight [n, k] of which the gradient is computed later.

    value  the weight itself, through which no gradient flows
    x, dy  places, without memory, of the shapes of x [..., k] and y [..., n]: their gradients are x and that of y
    """

    value: Tensor
    x: Tensor
    dy: Tensor


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """x [..., k] by weight [n, k] -> [..., n]; with a bias [n], whose gradient is computed at once."""
    return _Linear.apply(x, *weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, _x: Tensor, _dy: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        return dx, None, x, dy, dy.flatten(0, -2).sum(0) if ctx.needs_input_grad[4] else None


def weight_gradient(x: Tensor, dy: Tensor) -> Tensor:
    """The gradient [n, k] of the weight of y = x W^T."""
    return dy.flatten(0, -2).t() @ x.flatten(0, -2)
