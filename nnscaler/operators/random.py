"""Dropout. What it drops depends on the place in the whole tensor, and so not on how a tensor is split.

A model's calls of dropout are traced as `nnscaler::drop`. They become calls of `nnscaler::dropout` (both in
`nnscaler.kernels.random`), which takes the numbers along each dimension as tensors. These are split as the dimensions
are.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from nnscaler.annotation import Shape
from nnscaler.graph import Node, TensorMeta
from nnscaler.kernels import random  # noqa: F401  which defines both operators
from nnscaler.operators.annotating import dim_names, write
from nnscaler.operators.pointwise import broadcast
from nnscaler.operators.registry import Counters, Operator, add, arguments, family, save_nothing
from nnscaler.operators.spelling import WrittenCall

TRACED, COUNTED = "nnscaler.drop.default", "nnscaler.dropout.default"


def drops(node: Node) -> bool:
    given = arguments(node)
    return bool(given["train"] and given["p"])


def identity(call: WrittenCall) -> str:
    """The input itself, whatever the other arguments say."""
    call.unwritten.clear()
    return call["input"]


def count(node: Node, inputs: Sequence[Shape], counters: Counters) -> None:
    given = arguments(node)
    apart = inputs[0][:2] if given["by_feature"] else inputs[0]
    numbers = [counters.numbers(apart, dim) for dim in range(len(apart))]
    node.op, node.args, node.kwargs = COUNTED, (given["x"], given["p"], counters.draws, counters.place(), numbers), {}


def dropout(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    names = dim_names(outputs[0])
    numbers = [[name] for name in names[: len(inputs) - 3]]
    return write([names, ["1", "5"], [], *numbers], [names])


def mask_bytes(sizes: dict[str, int], node: Node, inputs: Sequence[TensorMeta]) -> float:
    """A byte for each element that may be dropped."""
    numbers = len(inputs) - 3
    return float(prod(inputs[0].shape[:numbers]))


family(
    "dropout.default feature_dropout.default alpha_dropout.default", broadcast, identity, saves=save_nothing,
    draws=drops, alias=True,
)  # fmt: skip
add(Operator(TRACED, broadcast, draws=lambda node: True, counted=count))
add(Operator(COUNTED, dropout, "torch.ops.nnscaler.{op}(*)", saves=save_nothing, keeps=mask_bytes, composed=True))
