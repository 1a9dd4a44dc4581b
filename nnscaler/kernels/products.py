"""Matrix products in 16 bits on CPUs that have no instructions for them.

There, PyTorch multiplies such numbers one by one, which takes a hundred times as long as in fp32. Here it converts the
numbers that it reads to fp32, multiplies these, and rounds the result to 16 bits.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

logger = logging.getLogger(__name__)

# Those that are slow: measured, as products with vectors, convolutions of few channels and all else are not.
_PRODUCTS = (
    "mm", "mm.out", "addmm", "addmm.out", "addmm_", "bmm", "bmm.out", "baddbmm", "baddbmm.out", "baddbmm_",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
)  # fmt: skip


def are_slow(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether PyTorch's own products of this type take many times as long on this device as those in fp32."""
    return device.type == "cpu" and dtype in _slow_types()


@functools.cache
def _slow_types() -> frozenset[torch.dtype]:
    """The types that oneDNN cannot multiply on this CPU, as ONEDNN_MAX_CPU_ISA limits it; without oneDNN, all 16-bit
    types."""
    asked = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    return frozenset(dtype for dtype, name in asked.items() if not getattr(torch.ops.mkldnn, name, bool)())


@functools.cache
def widen_slow_products() -> None:
    """Makes this process compute products in types that are slow on its CPU in fp32, with PyTorch's fp32 kernels."""
    if _slow_types():
        logger.info("products in 16 bits are computed in fp32: this CPU has no instructions for them")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"(?s).*Overriding a previously registered kernel")
        for name in _PRODUCTS if _slow_types() else ():
            _library().impl(name, _widened(name), "CPU", with_keyset=True, allow_override=True)


@functools.cache
def _library() -> torch.library.Library:
    return torch.library.Library("aten", "IMPL")  # what it registers lasts as long as it does


def _widened(name: str) -> Callable[..., Any]:
    """The operator aten::`name` on a CPU, which computes in fp32 for types that are slow there."""
    kernel = torch.library.get_kernel(f"aten::{name}", "CPU")
    compute: Any = getattr(torch.ops.aten, name.removesuffix(".out").removesuffix("_"))

    def run(keys: torch.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        dtype = args[0].dtype
        if dtype not in _slow_types():
            return kernel.call_boxed(keys, *args, **kwargs)
        out = args[0] if name.endswith("_") else kwargs.pop("out", None)
        wide = pytree.tree_map_only(Tensor, Tensor.float, (args, kwargs))
        result = compute(*wide[0], **wide[1])
        if out is None:
            return pytree.tree_map_only(Tensor, lambda x: x.to(dtype), result)
        return out.resize_(result.shape).copy_(result)

    return run
