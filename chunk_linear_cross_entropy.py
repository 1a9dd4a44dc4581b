"""The last projection and the cross-entropy loss in one operator that never holds the logits of all tokens.

The logits of 131,072 tokens over Llama-3's 128,256 words are 32 GiB in bf16. Here a chunk of tokens at a time is
projected, and its losses and gradients are computed at once from the same logits, so that nothing of a chunk but its
gradients (the size of its inputs) outlives it, and backward computes no logits again. The weight's gradient is summed
over chunks in fp32 and rounded once, in its own memory: it is as exact as that of one product, however many chunks.
`in_chunks` is the same with the chunk that is fastest on H100: half as many sums in fp32 are read and written.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nnscaler import register_op
from nnscaler.kernels import add_product, rounded_in_place, scale_gradient, softmax_loss


def _flops(sizes: dict[str, int], node: object) -> float:
    """Three products of the size of the logits: the logits, and the gradients of both inputs."""
    return 6.0 * sizes["b"] * sizes["l"] * sizes["d"] * sizes["n"]


def _workspace(sizes: dict[str, int], node: Any, inputs: Sequence[Any]) -> float:
    """The logits of a chunk, and what the sum of the weight's gradient takes beyond the gradient itself."""
    weight = inputs[1]
    chunk = dict(enumerate(node.args)).get(4, node.kwargs.get("chunk_size", 1024))
    logits = min(chunk, sizes["b"] * sizes["l"]) * sizes["n"] * weight.dtype.itemsize
    wider = max(torch.float32.itemsize - weight.dtype.itemsize, 0) * weight.requires_grad
    return float(logits + wider * sizes["n"] * sizes["d"])


@register_op("b l d^, n^ d^, b l -> b l", flops=_flops, backward=0.0, workspace=_workspace)
def chunk_linear_cross_entropy(
    hidden_states: Tensor, weight: Tensor, labels: Tensor, padding_idx: int, chunk_size: int = 1024
) -> Tensor:
    """Cross-entropy of `hidden_states @ weight.T` against `labels`, token by token.

    hidden_states  [b, l, d], any float type
    weight         [n, d], the same type
    labels         [b, l], int64: the index of the right word, or `padding_idx`
    padding_idx    label of tokens that count for nothing: their loss and gradient are 0
    chunk_size     tokens whose logits exist at a time

    Returns [b, l] losses in fp32. Backward is cheapest where every loss has the same gradient, as after a sum; other
    gradients are right too, and cost the logits once more; so does a second backward. Raises ValueError for shapes that
    do not fit, and for a label that is no index of a word; on a GPU, where that is known later, an assertion of CUDA
    fails.
    """
    if hidden_states.shape[:-1] != labels.shape or hidden_states.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"hidden_states {list(hidden_states.shape)}, weight {list(weight.shape)} and labels {list(labels.shape)} "
            "do not fit; expected [b, l, d], [n, d] and [b, l]"
        )
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it must be at least 1")
    _check_labels(labels, padding_idx, len(weight))
    losses = _ChunkedLoss.apply(hidden_states.flatten(0, -2), weight, labels.flatten(), padding_idx, chunk_size)
    return losses.view(labels.shape)


def _check_labels(labels: Tensor, padding_idx: int, words: int) -> None:
    known = (labels == padding_idx) | ((labels >= 0) & (labels < words))
    if labels.is_cuda:
        torch._assert_async(known.all(), f"a label is not one of {words} words, nor padding_idx={padding_idx}")
    elif labels.device.type == "cpu" and not known.all():  # not while it is planned, without values
        raise ValueError(
            f"a label is {int(labels[~known][0])}; labels must be from 0 to {words - 1}, or padding_idx={padding_idx}"
        )


in_chunks = functools.partial(chunk_linear_cross_entropy, chunk_size=2048)


class _ChunkedLoss(torch.autograd.Function):
    """[t, d], [n, d], [t] -> [t]. Gradients are computed in forward for an incoming gradient of one a token."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, padding_idx: int, chunk_size: int) -> Tensor:
        ctx.padding_idx, ctx.chunk_size = padding_idx, chunk_size
        ctx.wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        losses, *ctx.gradients = _run(hidden, weight, labels, padding_idx, chunk_size, None, ctx.wanted)
        ctx.save_for_backward(hidden, weight, labels)
        return losses

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("chunk_linear_cross_entropy has no second derivative: leave out create_graph=True")
        hidden, weight, labels = ctx.saved_tensors
        gradients, ctx.gradients = ctx.gradients, None
        # One number for all tokens, as a sum's backward gives, has stride 0: known without looking at its values.
        uniform = len(gradient) > 0 and (len(gradient) == 1 or gradient.stride() == (0,))
        factor = gradient[0] if uniform else gradient.new_ones(())
        if gradients is None or not uniform:
            # Those of forward were for ones, or went, as large as the inputs, to the backward before.
            del gradients
            incoming = None if uniform else gradient
            _, *gradients = _run(hidden, weight, labels, ctx.padding_idx, ctx.chunk_size, incoming, ctx.wanted)
        hidden_gradient, weight_sum = gradients
        if hidden_gradient is not None:
            scale_gradient(hidden_gradient, factor)
        weight_gradient = None if weight_sum is None else rounded_in_place(weight_sum, factor, weight.dtype)
        return hidden_gradient, weight_gradient, None, None, None


def _run(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    padding_idx: int,
    chunk_size: int,
    gradient: Tensor | None,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Losses [t], and where wanted the gradients of hidden, and of weight in fp32 at least, for the losses' `gradient`
    (None: all ones)."""
    losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    hidden_gradient = torch.empty_like(hidden) if wanted[0] else None
    wide = torch.promote_types(weight.dtype, torch.float32)
    weight_sum = torch.empty(weight.shape, dtype=wide, device=weight.device) if wanted[1] else None
    for start in range(0, len(hidden), chunk_size):
        chunk = slice(start, start + chunk_size)
        logits = hidden[chunk] @ weight.t()
        incoming = None if gradient is None else gradient[chunk]
        losses[chunk], logits_gradient = softmax_loss(logits, labels[chunk], padding_idx, incoming, any(wanted))
        del logits  # its memory is the gradient's
        if hidden_gradient is not None:
            torch.mm(logits_gradient, weight, out=hidden_gradient[chunk])
        if weight_sum is not None:
            add_product(weight_sum, logits_gradient.t(), hidden[chunk], first=start == 0)
        del logits_gradient  # before the next chunk's logits exist
        if hidden.is_meta:  # there is nothing to compute, and one chunk is as good as all
            break
    if weight_sum is not None and not len(hidden):
        weight_sum.zero_()
    return losses, hidden_gradient, weight_sum
