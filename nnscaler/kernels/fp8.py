"""Matrix products in fp8: y = x W^T, and its gradients, of numbers rounded to eight bits (e4m3).

Each tensor has one scale, by which its largest element becomes the largest number of e4m3:

    scale = max |x| / 448,    x8 = e4m3(x / scale),    y = (x8 W8^T) scale_x scale_W

A product adds up in fp32, and gives its result in the type of x. A shard of a tensor has a scale of its own.

The device multiplies only matrices of which both lie along the dimension that is summed over. Forward sums over k,
backward over n and m, so each tensor is needed in two orders: as it is, and transposed. Backward needs the transposed
x8, half the bytes of x, and no x; it rounds W again, but where W has come in fp8 (see `Weight`). The scale of a stored
W is found once an update (see `nnscaler.runtime.module.Weights`), not in each product: so it is known in backward too.

    forward    y  [m, n] = x8  [m, k] by W8  [n, k]
    backward   dx [m, k] = dy8 [m, n] by W8' [k, n]
               dW [n, k] = dy8'[n, m] by x8' [k, m]

All of this is plain torch, which is compiled with what is around it: the largest element is found where a tensor is
made, and both orders are written by one kernel; or the transposed one after it, where that also adds up rows. On H100,
a Llama-3 8B layer takes 16,384 tokens forward and backward in 29.8 ms so, in 40.9 ms in bf16. Kernels of our own, which
read each tensor once for both orders, were as fast, but are slow to call.
"""

from __future__ import annotations

import functools
import logging
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nnscaler.kernels.gradient import write_scaled

logger = logging.getLogger(__name__)

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
ALIGNED = 16  # sizes of which a GPU's products want multiples
_SMALLEST = 1e-30  # for tensors of zeros


class Rounded(NamedTuple):
    """A tensor [..., k] for products in fp8.

    value    the tensor itself, through which gradients flow
    rows     [m, k] e4m3, where m is the product of the other sizes
    columns  [k, m] e4m3: the same, transposed
    scale    [] fp32: `value` is nearly `rows * scale`
    """

    value: Tensor
    rows: Tensor
    columns: Tensor
    scale: Tensor


class Weight(NamedTuple):
    """A weight [n, k] of which products need not find the scale, nor round it where it has come in fp8.

    value  the weight; or, where it has come in fp8, a place of its shape, and without memory, through which its
           gradient flows
    scale  [] fp32: the weight is nearly `rows * scale`
    rows   [n, k] e4m3; None: products round the weight
    """

    value: Tensor
    scale: Tensor
    rows: Tensor | None = None


def rounded(x: Tensor) -> Rounded:
    """x [..., k] in fp8, for each of the products that take it."""
    matrix = x.detach().flatten(0, -2)
    scale = scale_of(matrix)
    rows = _in_memory(round_by(matrix, scale))
    return Rounded(x, rows, _in_memory(rows.t().contiguous()), scale)


def linear(x: Rounded, weight: Tensor | Weight) -> Tensor:
    """x [..., k] by weight [n, k] -> [..., n], in the type of x; gradients have the types of what they are of."""
    given = weight if isinstance(weight, Weight) else (weight, None, None)
    return _Linear.apply(x.value, x.rows, x.columns, x.scale, *given)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        rows: Tensor,
        columns: Tensor,
        scale: Tensor,
        weight: Tensor,
        weight_scale: Tensor | None,
        weight_rows: Tensor | None,
    ) -> Tensor:
        kept = weight if weight_rows is None else weight_rows
        if weight_scale is None:
            weight_scale = scale_of(weight)
        if weight_rows is None:
            weight_rows = round_by(weight, weight_scale)
        ctx.weight_dtype = weight.dtype
        ctx.save_for_backward(columns if ctx.needs_input_grad[4] else None, scale, kept, weight_scale)
        result = product(rows, weight_rows, scale, weight_scale, value.dtype, fast=True)
        return result.view(*value.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        columns, scale, weight, weight_scale = ctx.saved_tensors
        matrix = gradient.flatten(0, -2)
        gradient_scale = scale_of(matrix)
        rows = round_by(matrix, gradient_scale)
        of_value, of_weight = None, None
        if ctx.needs_input_grad[0]:
            transposed = (weight if weight.dtype == E4M3 else round_by(weight, weight_scale)).t().contiguous()
            of_value = product(rows, transposed, gradient_scale, weight_scale, gradient.dtype)
            of_value = of_value.view(*gradient.shape[:-1], weight.shape[1])
        if ctx.needs_input_grad[4]:
            of_weight = product(rows.t().contiguous(), columns, gradient_scale, scale, ctx.weight_dtype)
        return of_value, None, None, None, of_weight, None, None


def scale_of(x: Tensor) -> Tensor:
    """The scale [] fp32 of a matrix. It is not a number where the matrix holds something that is none."""
    # The largest of each row first: a compiler finds it where the rows are made.
    return by_largest(torch.linalg.vector_norm(x, math.inf, -1, dtype=torch.float32).amax())


def _in_memory(x: Tensor) -> Tensor:
    """x, which a compiler must write before it goes on.

    Else it writes x anew for each product that takes it; and backward, which makes the rows again, writes them
    transposed where it makes them, byte by byte, rather than once they are there, by tiles.
    """
    return x.as_strided(x.size(), x.stride())


def by_largest(largest: Tensor) -> Tensor:
    """The scales of matrices whose largest elements these are, in fp32."""
    return largest.clamp(min=_SMALLEST) / LARGEST


def round_by(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale in e4m3."""
    return (x.float() * scale.reciprocal()).to(E4M3)


def rounded_alone(x: Tensor, scale: Tensor) -> Tensor:
    """The same of a contiguous tensor, where nothing around it is compiled: on a GPU that knows fp8, by one kernel."""
    if not (x.is_cuda and _knows_fp8()):
        return round_by(x, scale)
    result = torch.empty_like(x, dtype=E4M3)
    write_scaled(x.view(-1), result.view(-1), scale.reciprocal())
    return result


def product(
    left: Tensor, right: Tensor, left_scale: Tensor, right_scale: Tensor, dtype: torch.dtype, fast: bool = False
) -> Tensor:
    """left [m, k] by right [n, k], both in e4m3, times their scales -> [m, n].

    fast  whether sums may be kept in less than fp32 for some steps, as is good enough for forward
    """
    aligned = all(size % ALIGNED == 0 for size in (*left.shape, len(right)))
    if aligned and _multiplies(left.is_cuda):
        return torch._scaled_mm(
            left, right.t(), scale_a=left_scale, scale_b=right_scale, out_dtype=dtype, use_fast_accum=fast
        )
    return ((left.float() @ right.float().t()) * (left_scale * right_scale)).to(dtype)


@torch.compiler.assume_constant_result
def _multiplies(on_gpu: bool) -> bool:
    """Whether the device's own products in fp8 are used; else the same numbers are multiplied in fp32. On CPUs that is
    a hundred times as fast: oneDNN has such products for few of them, and multiplies one by one for the others."""
    return on_gpu and _knows_fp8()


@functools.cache
def _knows_fp8() -> bool:
    """Whether this process's GPU has products in fp8. Where it does not, the same numbers are multiplied in fp32."""
    if torch.version.hip is None and torch.cuda.get_device_capability() >= (8, 9):
        return True
    logger.warning("%s has no products in fp8: they are computed in fp32, which is slow", torch.cuda.get_device_name())
    return False
