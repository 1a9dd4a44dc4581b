"""Attention as one operator, split over key-value heads, or along the sequence."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import Tensor

from nnscaler.annotation import Shape
from nnscaler.graph import Node
from nnscaler.kernels import attend
from nnscaler.operators.annotating import write
from nnscaler.operators.registry import arguments, family, register_op, save_both


def attention_flops(sizes: dict[str, int], node: Node) -> float:
    """Two products of every query with every key that it sees: with a causal mask the last query sees all."""
    dense = 2.0 * sizes["b"] * sizes["k"] * sizes["g"] * sizes["l"] * sizes["s"] * (sizes["d"] + sizes["e"])
    return dense * (1 - sizes["l"] / sizes["s"] / 2) if _is_causal(node) else dense


def _is_causal(node: Node) -> bool:
    return bool(arguments(node)["is_causal"])


# Backward recomputes the scores: five products for forward's two.
ATTENTION_BACKWARD = 2.5


@register_op(
    "b (k g^) l d^, b k s^ d^, b k s^ e^ -> b l (k g^) e^",
    flops=attention_flops,
    backward=ATTENTION_BACKWARD,
    saves=save_both,
    along={"l": "nnscaler.runtime.attention.attention_along_l"},
)
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None = None,
    is_causal: bool = True,
    kernel: str = "auto",
) -> Tensor:
    """Softmax attention with grouped key-value heads.

    query [b, h, l, d], key [b, k, s, d], value [b, k, s, e], with h a multiple of k: query head i attends to key-value
    head i // (h / k). Returns [b, l, h, e] in the dtype of `query`. `scale` multiplies the scores; None is 1 / sqrt(d).
    `kernel` is a name of `nnscaler.kernels.KERNELS`, or auto.
    """
    return attend(query, key, value, scale, is_causal, kernel)


def scaled_dot_product_attention(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    """ATen's own: query [..., h, l, d], key and value [..., k, s, d], perhaps a mask that broadcasts to the scores."""
    query, key = inputs[0], inputs[1]
    lead = [f"b{i}" for i in range(len(query) - 3)]
    heads, shared = (["(k g^)"], ["k"]) if len(query) > 2 and query[-3] != key[-3] else (["k"], ["k"])
    if len(query) == 2:
        heads, shared = [], []
    rows = "l^" if _is_causal(node) else "l"
    tensors = [[*lead, *heads, rows, "d^"], [*lead, *shared, "s^", "d^"], [*lead, *shared, "s^", "e^"]]
    for mask in inputs[3:]:
        scores = list(zip([*lead, *heads, rows, "s^"], [*query[:-1], key[-2]]))[len(query) - len(mask) :]
        tensors.append([name if size == full else "1" for size, (name, full) in zip(mask, scores)])
    return write(tensors, [[*lead, *heads, rows, "e^"]])


def sdpa_flops(sizes: dict[str, int], node: Node) -> float:
    batch = prod(size for name, size in sizes.items() if name.startswith("b"))
    return attention_flops({"k": 1, "g": 1, **sizes, "b": batch}, node)


family(
    "scaled_dot_product_attention.default",
    scaled_dot_product_attention,
    "F.scaled_dot_product_attention(*)",
    flops=sdpa_flops,
    backward=ATTENTION_BACKWARD,
    saves=save_both,
    draws=lambda node: arguments(node)["dropout_p"] > 0,
)
