"""Losses of each element and its target, which are given one by one, summed, or averaged."""

from __future__ import annotations

from collections.abc import Sequence

from nnscaler.annotation import Shape
from nnscaler.graph import Node
from nnscaler.operators.annotating import dim_names, write
from nnscaler.operators.reduce import REDUCTIONS
from nnscaler.operators.registry import arguments, backward_reads, family
from nnscaler.operators.spelling import WrittenCall


def elementwise(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    """A sum may be split: devices compute terms of it. A mean stays whole."""
    mode = REDUCTIONS[arguments(node)["reduction"]]
    names = [name + {"none": "", "mean": "^", "sum": "+"}[mode] for name in dim_names(inputs[0])]
    return write([names] * len(inputs), [names if mode == "none" else []])


def text(call: WrittenCall) -> str:
    reduction = REDUCTIONS[call.value("reduction")]
    return call.fill("F.{op}({self}, {target}, **)")[:-1] + f', reduction="{reduction}")'


family(
    "mse_loss.default smooth_l1_loss.default huber_loss.default", elementwise, text,
    saves=backward_reads(self="self target", target="self target"),
)  # fmt: skip
