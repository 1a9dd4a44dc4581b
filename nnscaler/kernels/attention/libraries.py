"""The kernels of several libraries, each as a function of the same arguments."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nnscaler.kernels.attention.asked import Asked

# (query [b, l, h, d], key [b, s, k, d], value [b, s, k, e], what is asked) -> [b, l, h, e]
Run = Callable[[Tensor, Tensor, Tensor, Asked], Tensor]


def flash_attention(module: str, cap: float | None, unlimited: int | None) -> Run:
    """The functions of flash-attn in `module`. There, places count from the end: the last row has the place of the last
    key.

    cap        the value that means: scores are not capped
    unlimited  the value that means: a window has no end
    """
    library = importlib.import_module(module)
    attend, attend_documents = library.flash_attn_func, library.flash_attn_varlen_func

    def run(q: Tensor, k: Tensor, v: Tensor, asked: Asked) -> Tensor:
        # Where keys come after the last row's place, the library takes each row for one that stands later.
        later = k.shape[1] - q.shape[1] - asked.first
        left = unlimited if asked.left is None else asked.left + later
        right = unlimited if asked.right is None else asked.right - later
        options: dict[str, Any] = {
            "softmax_scale": asked.scale,
            "causal": right == 0,
            "window_size": (left, right if right != 0 or asked.left is not None else unlimited),
            "softcap": cap if asked.softcap is None else asked.softcap,
        }
        if asked.sinks is not None:
            options["learnable_sink"] = asked.sinks
        if asked.slopes is not None:
            options["alibi_slopes"] = asked.slopes.float()
        if asked.documents is None:
            return _first(attend(q, k, v, **options))
        rows, keys, longest = asked.documents.borders(asked.first, q.shape[1])
        options |= {"cu_seqlens_q": rows, "cu_seqlens_k": keys, "max_seqlen_q": longest, "max_seqlen_k": longest}
        found = attend_documents(*(x.flatten(0, 1) for x in (q, k, v)), **options)
        return _first(found).unflatten(0, q.shape[:2])

    return run


def _first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def cudnn() -> Run:
    def run(q: Tensor, k: Tensor, v: Tensor, asked: Asked) -> Tensor:
        if asked.right == 0 and q.shape[1] != k.shape[1]:  # its causal mask is aligned with the first row, not the last
            return sdpa()(q, k, v, asked)
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
            return _scaled_dot_product(q, k, v, asked)

    if not torch.backends.cudnn.is_available():
        raise ImportError("cuDNN is not there")
    return run


def sdpa() -> Run:
    def run(q: Tensor, k: Tensor, v: Tensor, asked: Asked) -> Tensor:
        if asked.right == 0 and q.shape[1] != k.shape[1]:
            if q.is_cuda:  # torch's own flash attention, whose causal mask ends with the last row
                parts = [x.transpose(1, 2) for x in (q, k, v)]
                return torch.ops.aten._scaled_dot_product_flash_attention(
                    *parts, dropout_p=0.0, is_causal=True, scale=asked.scale
                )[0].transpose(1, 2)
            from torch.nn.attention.bias import causal_lower_right  # which imports torch's compiler: a second or more

            groups = q.shape[2] // k.shape[2]  # a mask object and grouped heads do not go together
            k, v = (x.repeat_interleave(groups, 2).transpose(1, 2) for x in (k, v))
            mask = causal_lower_right(q.shape[1], k.shape[2])
            out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask, scale=asked.scale)
            return out.transpose(1, 2)
        return _scaled_dot_product(q, k, v, asked)

    return run


def _scaled_dot_product(q: Tensor, k: Tensor, v: Tensor, asked: Asked) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped, is_causal = q.shape[1] != k.shape[1], asked.right == 0
    out = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=asked.scale, enable_gqa=grouped)
    return out.transpose(1, 2)
