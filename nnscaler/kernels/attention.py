"""Attention kernels of several libraries behind one function; which is fastest is found out on the device itself.

flash_attention_4  flash-attn-4 (Hopper, Blackwell)     flash_attention_2  flash-attn
flash_attention_3  flash-attn's Hopper build            cudnn, sdpa        PyTorch's own
"""

from __future__ import annotations

import functools
import importlib
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nnscaler.errors import UserError

logger = logging.getLogger(__name__)

# (query [b, l, h, d], key [b, s, k, d], value [b, s, k, e], scale, is_causal) -> [b, l, h, e]
# A causal mask lets the last query see all keys, the one before all but one, and so on.
Kernel = Callable[[Tensor, Tensor, Tensor, float | None, bool], Tensor]

PROBE_TOKENS = 8192  # long enough that the kernels' order is that of longer sequences


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float | None, is_causal: bool, kernel: str) -> Tensor:
    """Softmax attention: query [b, h, l, d], key [b, k, s, d], value [b, k, s, e] -> [b, l, h, e] in query's dtype.

    h is a multiple of k: query head i attends to key-value head i // (h / k). `kernel` is a name of `KERNELS`, or auto:
    the fastest on this device. On a CPU it is always sdpa. Raises UserError for a kernel that is not installed.
    """
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return _chosen(query, key, value, kernel)(query, key, value, scale, is_causal)


def attend_to_prefix(query: Tensor, key: Tensor, value: Tensor, scale: float | None, kernel: str, end: int) -> Tensor:
    """Causal attention of some rows of a longer sequence: the query's last row is row `end` - 1 of keys and values."""
    return attend(query, key[:, :, :end], value[:, :, :end], scale, True, kernel)


def _flash_attention(module: str) -> Kernel:
    function = importlib.import_module(module).flash_attn_func

    def run(q: Tensor, k: Tensor, v: Tensor, scale: float | None, is_causal: bool) -> Tensor:
        result = function(q, k, v, softmax_scale=scale, causal=is_causal)
        return result[0] if isinstance(result, tuple) else result

    return run


def _cudnn() -> Kernel:
    def run(q: Tensor, k: Tensor, v: Tensor, scale: float | None, is_causal: bool) -> Tensor:
        if is_causal and q.shape[1] != k.shape[1]:  # its causal mask is aligned with the first row, not the last
            return _sdpa()(q, k, v, scale, is_causal)
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
            return _scaled_dot_product(q, k, v, scale, is_causal)

    if not torch.backends.cudnn.is_available():
        raise ImportError("cuDNN is not there")
    return run


def _sdpa() -> Kernel:
    def run(q: Tensor, k: Tensor, v: Tensor, scale: float | None, is_causal: bool) -> Tensor:
        if is_causal and q.shape[1] != k.shape[1]:
            if q.is_cuda:  # torch's own flash attention, whose causal mask ends with the last row
                parts = [x.transpose(1, 2) for x in (q, k, v)]
                return torch.ops.aten._scaled_dot_product_flash_attention(
                    *parts, dropout_p=0.0, is_causal=True, scale=scale
                )[0].transpose(1, 2)
            from torch.nn.attention.bias import causal_lower_right  # which imports torch's compiler: a second or more

            groups = q.shape[2] // k.shape[2]  # a mask object and grouped heads do not go together
            k, v = (x.repeat_interleave(groups, 2).transpose(1, 2) for x in (k, v))
            mask = causal_lower_right(q.shape[1], k.shape[2])
            return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, scale=scale).transpose(1, 2)
        return _scaled_dot_product(q, k, v, scale, is_causal)

    return run


def _scaled_dot_product(q: Tensor, k: Tensor, v: Tensor, scale: float | None, is_causal: bool) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale, enable_gqa=grouped).transpose(1, 2)


KERNELS: dict[str, Callable[[], Kernel]] = {
    "flash_attention_4": functools.partial(_flash_attention, "flash_attn.cute"),
    "flash_attention_3": functools.partial(_flash_attention, "flash_attn_interface"),
    "flash_attention_2": functools.partial(_flash_attention, "flash_attn"),
    "cudnn": _cudnn,
    "sdpa": _sdpa,
}


def _chosen(query: Tensor, key: Tensor, value: Tensor, kernel: str) -> Kernel:
    if not query.is_cuda:
        return _load("sdpa")
    if kernel == "auto":
        heads = (query.shape[2], key.shape[2], query.shape[3], value.shape[3])
        kernel = _probed(query.device, query.dtype, *heads, min(key.shape[1], PROBE_TOKENS))
    return _load(kernel)


@functools.cache
def _load(kernel: str) -> Kernel:
    try:
        return KERNELS[kernel]()
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"the attention kernel '{kernel}' is not installed ({error}); use auto, cudnn or sdpa"
        ) from None


@functools.cache
def _probed(device: torch.device, *shape: Any) -> str:
    """The fastest kernel, found out in a thread of its own: a checkpoint that the call is part of must not count what
    the probe keeps for its backward."""

    def probe() -> str:
        with torch.cuda.device(device):
            torch.cuda.synchronize()  # what was launched before is not the kernels' time
            return _fastest(device, *shape)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(probe).result()


def _fastest(device: torch.device, dtype: torch.dtype, h: int, k: int, d: int, e: int, length: int) -> str:
    """The kernel with the least time for forward and backward of one causal sequence among those that work, and are
    right: their results must be as near to fp32's as twice plain SDPA's are."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(1, length, h, d), (1, length, k, d), (1, length, k, e), (1, length, h, e)]
    q, k_, v, gradient = (torch.randn(s, dtype=dtype, device=device, generator=generator) for s in shapes)
    inputs = [x.requires_grad_() for x in (q, k_, v)]
    head = slice(0, min(length, 1024))  # what is compared in fp32: causal attention's first rows do not see the rest
    exact = _results(_load("sdpa"), [x[:, head].float().detach().requires_grad_() for x in inputs], gradient[:, head])
    seconds: dict[str, float] = {}
    errors: dict[str, float] = {}
    for name in sorted(KERNELS, key=lambda name: name != "sdpa"):  # the one that the others are held against first
        try:
            kernel = KERNELS[name]()
            found = _results(kernel, [x[:, head].detach().requires_grad_() for x in inputs], gradient[:, head])
            errors[name] = max(_error(a, b) for a, b in zip(found, exact))
            if errors[name] > 2 * errors["sdpa"] + 1e-3:
                logger.warning("attention kernel %s is wrong by %.2g here: not used", name, errors[name])
                continue
            seconds[name] = _time(lambda kernel=kernel: _results(kernel, inputs, gradient))  # type: ignore[misc]
        except (ImportError, AttributeError, RuntimeError, AssertionError, TypeError) as error:
            logger.debug("attention kernel %s does not work here: %s", name, error)
    best = min(seconds, key=lambda name: seconds[name])
    logger.info(
        "attention by %s (forward and backward of %d tokens, %d heads: %s)",
        best, length, h, ", ".join(f"{name} {1e3 * value:.2f} ms" for name, value in sorted(seconds.items())),
    )  # fmt: skip
    return best


def _results(kernel: Kernel, inputs: list[Tensor], gradient: Tensor) -> list[Tensor]:
    with torch.enable_grad():
        out = kernel(inputs[0], inputs[1], inputs[2], None, True)
        return [out.detach(), *torch.autograd.grad(out, inputs, gradient.to(out.dtype))]


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.float() - exact).norm() / exact.norm())


def _time(function: Callable[[], object], runs: int = 3) -> float:
    function()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(runs):
        function()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / runs
