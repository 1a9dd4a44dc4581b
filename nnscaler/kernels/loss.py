"""Cross-entropy of logits, and its gradient in the logits' own memory."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

_CACHED = 2**19  # elements in fp32 that a core's cache holds


def softmax_loss(
    logits: Tensor, labels: Tensor, padding_idx: int, gradient: Tensor | None, wanted: bool
) -> tuple[Tensor, Tensor]:
    """The cross-entropy of each row of logits, and its gradient: (losses [t], gradient of the logits [t, n]).

    logits       [t, n], any float type; it is overwritten
    labels       [t] int64: the index of the right word, or `padding_idx`, whose rows get loss 0 and gradient 0. Any
                 other value is an error on a CPU, and gives a loss that is not a number on a GPU
    padding_idx  the label of rows that do not count
    gradient     [t]: the gradient of the losses; None: all ones
    wanted       whether the gradient of the logits is wanted; if not, the second result means nothing

    The losses are fp32 (fp64 for fp64 logits), and the gradient has the type of `logits`.
    """
    if logits.is_cuda and logits.dtype != torch.float64 and logits.is_contiguous():
        return _on_gpu(logits, labels, padding_idx, gradient, wanted)
    return _plain(logits, labels, padding_idx, gradient, wanted)


def _plain(
    logits: Tensor, labels: Tensor, padding_idx: int, gradient: Tensor | None, wanted: bool
) -> tuple[Tensor, Tensor]:
    """On a CPU: some rows at a time, as many as stay in its cache from pass to pass."""
    losses = torch.empty(len(logits), dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device)
    rows = max(1, _CACHED // max(1, logits.shape[1]) if logits.device.type == "cpu" else len(logits))
    for start in range(0, len(logits), rows):
        part = slice(start, start + rows)
        x, label = logits[part].to(losses.dtype), labels[part]
        counted = label != padding_idx
        x.masked_fill_(~counted.unsqueeze(1), 0.0)  # whatever a row that counts for nothing holds, it does no harm
        target = torch.where(counted, label, 0).unsqueeze(1)
        largest = x.amax(dim=1, keepdim=True)
        at_target = x.gather(1, target) - largest
        total = x.sub_(largest).exp_().sum(dim=1, keepdim=True)
        losses[part] = torch.where(counted, (total.log() - at_target).squeeze(1), 0.0)
        if wanted:
            # d loss / d logits = softmax - one at the label, times the loss's gradient.
            factor = torch.where(counted, 1.0 if gradient is None else gradient[part].to(x.dtype), 0.0).unsqueeze(1)
            logits[part] = x.mul_(factor.to(x.dtype) / total).scatter_add_(1, target, -factor.to(x.dtype))
    return losses, logits


def _on_gpu(
    logits: Tensor, labels: Tensor, padding_idx: int, gradient: Tensor | None, wanted: bool
) -> tuple[Tensor, Tensor]:
    """On a GPU: one program a row, which reads the row twice.

    It reads forwards for maximum and sum, and backwards for the gradient, while much of the row is still in the cache.
    """
    rows, words = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    _kernel()[(rows,)](
        logits, labels, losses, gradient if gradient is not None else losses, words, padding_idx,
        0 if gradient is None else gradient.stride(0),
        HAS_GRADIENT=gradient is not None, WANTED=wanted, BLOCK=16384, num_warps=32,
    )  # fmt: skip
    return losses, logits


@functools.cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def softmax_loss_kernel(  # type: ignore[no-untyped-def]
        logits, labels, losses, gradient, words, padding_idx, gradient_stride,
        HAS_GRADIENT: tl.constexpr, WANTED: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
    ):  # fmt: skip
        row = tl.program_id(0)
        label = tl.load(labels + row)
        start = logits + row.to(tl.int64) * words
        counted = label != padding_idx
        # Read before the reductions, behind which all threads have it, for the gradient overwrites the logits.
        known = counted & (label >= 0) & (label < words)
        at_label = tl.load(start + label, mask=known, other=float("nan")).to(tl.float32)
        offsets = tl.arange(0, BLOCK)
        log2_e = 1.4426950408889634
        # Eight columns of a block lie in one thread, which keeps their maximum and sum; all meet once, at the end.
        largest = tl.full((BLOCK // 8,), -3e38, tl.float32)
        total = tl.zeros((BLOCK // 8,), tl.float32)
        for at in range(0, words, BLOCK):
            x = tl.load(
                start + at + offsets, mask=at + offsets < words, other=-float("inf"), eviction_policy="evict_last"
            )
            x = tl.reshape(x.to(tl.float32) * log2_e, (BLOCK // 8, 8))
            higher = tl.maximum(largest, tl.max(x, 1))
            total = total * tl.exp2(largest - higher) + tl.sum(tl.exp2(x - higher[:, None]), 1)
            largest = higher
        top = tl.max(largest, 0)
        log_of_row = top + tl.log2(tl.sum(total * tl.exp2(largest - top), 0))
        tl.store(losses + row, tl.where(counted, log_of_row / log2_e - at_label, 0.0))
        if WANTED:
            factor = tl.where(counted, 1.0, 0.0)
            if HAS_GRADIENT:
                factor = tl.where(counted, tl.load(gradient + row * gradient_stride).to(tl.float32), 0.0)
            blocks = tl.cdiv(words, BLOCK)
            for done in range(0, blocks):
                columns = (blocks - 1 - done) * BLOCK + offsets
                inside = columns < words
                x = tl.load(start + columns, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
                value = tl.where(counted, tl.exp2(x * log2_e - log_of_row) * factor, 0.0)
                value = tl.where(columns == label, value - factor, value)
                tl.store(start + columns, value.to(logits.dtype.element_ty), mask=inside, eviction_policy="evict_first")

    return softmax_loss_kernel
