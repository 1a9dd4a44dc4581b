"""Registered operators of all kinds that a user may have, and a module that uses them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnscaler import register_op

WIDTH = 16


class Side(Enum):
    LEFT = 1
    RIGHT = 2


def squashed(x: Tensor, by: float = 1.0) -> Tensor:
    return (x * by).tanh()


@register_op("row column, column, column -> row column", name="own_affine")
def affine(x, limit: float | None = None, scale=None, shift=None):
    """Tensors that may be left out, after a constant that is None."""
    x = x if limit is None else x.clamp(-limit, limit)
    x = x if scale is None else x * scale
    return x if shift is None else x + shift


@register_op("row column, column, row -> row column", name="own_weighted")
def weighted(x, *, columns, rows=None):
    """Tensors by keyword."""
    return x * columns if rows is None else x * columns * rows[:, None]


@register_op("row column, row column, column -> row column", name="own_added")
def added(parts: list[Tensor], weights: Tensor) -> Tensor:
    """A list of tensors."""
    return sum(parts) * weights


@register_op("row column -> row column", name="own_applied")
def applied(x: Tensor, function: Callable[[Tensor], Tensor], side: Side, extra: dict | None = None) -> Tensor:
    """Functions, members of enumerations, and dicts as constants."""
    return function(x) * side.value + (extra or {"add": [0.0]})["add"][0]


@register_op("row column+ -> row column, row, row column", name="own_several")
def several(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.sigmoid(), x.sum(1), (x > 0).long()


class Scaled(torch.autograd.Function):
    """A gradient of its own, which is not that of its forward."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, factor: float = 2.0) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.factor = factor
        return x * weight * factor

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return gradient * weight * 3, (gradient * x).sum(0) * ctx.factor, None


class Negated(torch.autograd.Function):
    """Of the newer form, without a context in forward."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return -x

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient * -2


class Rounded(torch.autograd.Function):
    """Elementwise, with the gradient of what it rounds. Not registered."""

    @staticmethod
    def forward(ctx, x: Tensor, step: float) -> Tensor:
        ctx.step = step
        return (x / step).round() * step

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient.clamp(-1, 1), None


class Centred(torch.autograd.Function):
    """Not elementwise, and its gradient is another one's. Not registered."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x - x.mean(1, keepdim=True)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient * 2


scaled = register_op("row column, column -> row column")(Scaled.apply)
negated = register_op("* -> *")(Negated.apply)


@register_op("row column, column -> row column", name="own_compiled")
@torch.compile(backend="eager")
def compiled(x, weight, power=2):
    return x * weight**power


@register_op(
    lambda x, weight, transposed=False: f"{'* '[: x.dim() - 1]}k+, {'n k' if transposed else 'k n'} -> * n",
    name="own_product",
    flops=lambda sizes, node: 2.0 * sizes["k"] * sizes["n"] * sizes["*0"],
)
def product(x, weight, transposed=False):
    """Annotated by a function of its arguments."""
    return x @ (weight.T if transposed else weight)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrices = nn.ParameterList(torch.randn(WIDTH, WIDTH) / 4 for _ in range(2))
        self.vectors = nn.ParameterList(torch.rand(WIDTH) + 0.5 for _ in range(6))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        v = self.vectors
        x = affine(affine(x, scale=v[0]), 2.0, None, v[1])
        x = weighted(rows=x[:, 0], columns=v[2], x=x) + weighted(x, columns=v[2])
        x = product(x, self.matrices[0], transposed=True)
        x = added([x, x.cos()], v[3])
        x = applied(x, squashed, Side.RIGHT) + applied(x, F.gelu, side=Side.LEFT, extra={"add": [1.5, "b"]})
        x = applied(x, functools.partial(squashed, by=0.5), Side.LEFT)
        first, sums, positive = several(x)
        x = negated(first + positive * sums[:, None])
        x = scaled(x, v[4], 0.5) + scaled(x, v[4])
        x = compiled(x, v[5], power=3)
        x = Centred.apply(Rounded.apply(x, 0.25) + Negated.apply(x))
        return F.cross_entropy(product(x, self.matrices[1]), y)
