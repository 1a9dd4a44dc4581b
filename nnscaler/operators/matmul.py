"""Matrix products."""

from __future__ import annotations

from collections.abc import Sequence

from nnscaler.annotation import Shape
from nnscaler.graph import Node
from nnscaler.operators.registry import contraction_flops, family, save_cofactors
from nnscaler.operators.text import write


def linear(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    if len(inputs) == 3:
        # Devices that each add the bias to their term would add it several times: k stays whole.
        return "* k^, n k^, n -> * n"
    return "* k+, n k+ -> * n"


def addmm(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    bias = "n" if len(inputs[0]) == 1 else "m n"
    return f"{bias}, m k^, k^ n -> m n"


def matmul(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    left, right = inputs
    batch = outputs[0][: len(outputs[0]) - (len(left) > 1) - (len(right) > 1)]
    m, n = ["m"] * (len(left) > 1), ["n"] * (len(right) > 1)
    sources = [
        [*_batch(left, batch), *m, "k+"],
        [*_batch(right, batch), "k+", *n],
    ]
    return write(sources, [[*_batch((*batch, 1, 1), batch), *m, *n]])


def _batch(shape: Shape, batch: Shape) -> list[str]:
    """Names of the dimensions before the last two of `shape`, aligned from the right with the result's `batch`."""
    own = shape[:-2]
    aligned = list(enumerate(batch))[len(batch) - len(own) :]
    return [f"b{i}" if size == whole else "1" for size, (i, whole) in zip(own, aligned)]


family("linear.default", linear, flops=contraction_flops, saves=save_cofactors)
family("mm.default", lambda node, i, o: "m k+, k+ n -> m n", flops=contraction_flops, saves=save_cofactors)
family("bmm.default", lambda node, i, o: "b m k+, b k+ n -> b m n", flops=contraction_flops, saves=save_cofactors)
family("addmm.default", addmm, flops=contraction_flops, saves=save_cofactors)
family("matmul.default", matmul, flops=contraction_flops, saves=save_cofactors)
