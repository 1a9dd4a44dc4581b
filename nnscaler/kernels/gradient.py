"""Adding up gradients in fp32, and scaling them."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

_BLOCK = 8192  # elements of a program


def add_gradient(total: Tensor, gradient: Tensor, first: bool) -> None:
    """Adds a gradient [n] of any float type to a total [n] in fp32, which has no value yet if it is the `first`."""
    if total.is_cuda and gradient.is_contiguous() and len(total):
        # Where the types differ, PyTorch's own copying and adding reach half of the memory's bandwidth (H200).
        add, _ = _kernels()
        add[_grid(total)](total, gradient, len(total), FIRST=first, BLOCK=_BLOCK, num_warps=8)
    elif first:
        total.copy_(gradient)
    else:
        total += gradient


def scale_gradient(gradient: Tensor, factor: Tensor) -> None:
    """Multiplies a contiguous gradient by a number [] in its place. Where that is 1, a GPU leaves the memory alone."""
    if gradient.is_cuda:
        _, scale = _kernels()
        scale[_grid(gradient)](gradient, factor, gradient.numel(), BLOCK=_BLOCK, num_warps=8)
    else:
        gradient.mul_(factor.to(gradient.dtype))


def _grid(tensor: Tensor) -> tuple[int]:
    return (-(-tensor.numel() // _BLOCK),)


@functools.cache
def _kernels() -> tuple[Any, Any]:
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

    return add_gradient_kernel, scale_gradient_kernel
