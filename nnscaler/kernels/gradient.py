"""Gradients: adding them up in fp32, scaling them, and rounding them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from nnscaler.kernels.products import are_slow

_BLOCK = 8192  # elements of a program
_FIRST = 2**16  # elements that are rounded through memory of their own


def add_gradient(total: Tensor, gradient: Tensor, first: bool) -> None:
    """Adds a gradient [n] to a total [n], both of any float type. `first`: the total has no value yet"""
    if total.is_cuda and gradient.is_contiguous() and len(total):
        # Where the types differ, PyTorch's own copying and adding reach half of the memory's bandwidth (H200).
        add, _, _ = _kernels()
        add[_grid(total)](total, gradient, len(total), FIRST=first, BLOCK=_BLOCK, num_warps=8)
    elif first:
        total.copy_(gradient)
    else:
        total += gradient


def scale_gradient(gradient: Tensor, factor: Tensor) -> None:
    """Multiplies a contiguous gradient, in place, by a number []. Where that is 1, a GPU does not touch the memory."""
    if gradient.is_cuda:
        _, scale, _ = _kernels()
        scale[_grid(gradient)](gradient, factor, gradient.numel(), BLOCK=_BLOCK, num_warps=8)
    else:
        gradient.mul_(factor)  # which is not rounded to the gradient's type


def add_product(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """Adds left [m, k] @ right [k, n] to a total [m, n], which is in their type or in fp32. The product is not rounded
    before.

    first  the total has no value yet
    """
    kept = 0 if first else 1
    if left.dtype == total.dtype:
        total.addmm_(left, right, beta=kept)
    elif total.is_cuda and torch.version.hip is None:
        torch.addmm(total, left, right, out_dtype=total.dtype, beta=kept, out=total)
    elif are_slow(left.device, left.dtype):
        total.addmm_(left.to(total.dtype), right.to(total.dtype), beta=kept)
    else:  # the product as rounded, and what rounding took from it: products add in fp32 before they round
        rounded = left @ right
        add_gradient(total, rounded, first)
        total += torch.addmm(rounded, left, right, beta=-1)


def rounded_in_place(total: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous total times a number [], in `dtype`, which is no wider; the result lies in the total's memory."""
    if total.dtype == dtype:
        scale_gradient(total, factor)
        return total
    wide = total.view(-1)
    narrow = wide.view(dtype)[: len(wide)]
    # What a range becomes lies at half of its place or before: from its begin to its double nothing is overwritten
    # that is still to be read, but for the first range.
    stop = min(_FIRST, len(wide))
    narrow[:stop] = wide[:stop] * factor
    while stop < len(wide):
        start, stop = stop, min(2 * stop, len(wide))
        if total.is_cuda:
            write_scaled(wide[start:stop], narrow[start:stop], factor)
        else:
            torch.mul(wide[start:stop], factor.to(wide.dtype), out=narrow[start:stop])
    return narrow.view(total.shape)


def write_scaled(source: Tensor, target: Tensor, factor: Tensor) -> None:
    """Writes a tensor [n] times a number [], multiplied in fp32, to a target [n] of any float type; on a GPU."""
    _kernels()[2][_grid(source)](source, target, factor, len(source), BLOCK=_BLOCK, num_warps=8)


def _grid(tensor: Tensor) -> tuple[int]:
    return (-(-tensor.numel() // _BLOCK),)


@functools.cache
def _kernels() -> tuple[Any, Any, Any]:
    import triton
    import triton.language as tl

    @triton.jit
    def add_gradient_kernel(  # type: ignore[no-untyped-def]
        total, gradient, length, FIRST: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
    ):  # fmt: skip
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(gradient + at, mask=at < length, other=0.0).to(tl.float32)
        if not FIRST:
            value += tl.load(total + at, mask=at < length, other=0.0)
        tl.store(total + at, value, mask=at < length)

    @triton.jit
    def scale_gradient_kernel(gradient, factor, length, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
        by = tl.load(factor).to(tl.float32)
        if by != 1.0:
            at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            value = tl.load(gradient + at, mask=at < length).to(tl.float32) * by
            tl.store(gradient + at, value.to(gradient.dtype.element_ty), mask=at < length)

    @triton.jit
    def round_gradient_kernel(total, gradient, factor, length, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(total + at, mask=at < length) * tl.load(factor).to(tl.float32)
        tl.store(gradient + at, value.to(gradient.dtype.element_ty), mask=at < length)

    return add_gradient_kernel, scale_gradient_kernel, round_gradient_kernel
