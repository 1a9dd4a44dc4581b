"""Adding up gradients in fp32."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor


def add_gradient(total: Tensor, gradient: Tensor, first: bool) -> None:
    """Adds a gradient [n] of any float type to a total [n] in fp32, which has no value yet if it is the `first`."""
    if total.is_cuda and gradient.is_contiguous() and len(total):
        # Where the types differ, PyTorch's own copying and adding reach half of the memory's bandwidth (H200).
        _kernel()[(-(-len(total) // _BLOCK),)](total, gradient, len(total), FIRST=first, BLOCK=_BLOCK, num_warps=8)
    elif first:
        total.copy_(gradient)
    else:
        total += gradient


_BLOCK = 8192


@functools.cache
def _kernel() -> Any:
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

    return add_gradient_kernel
