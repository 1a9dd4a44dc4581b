"""Convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from nnscaler.annotation import Shape
from nnscaler.graph import Node
from nnscaler.operators.annotating import write
from nnscaler.operators.registry import arguments, backward_reads, family
from nnscaler.operators.spelling import WrittenCall


def convolution(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    """input [n, c, l...], weight [o, c / groups, k...], bias [o] -> [n, o, m...]

    The places `l` stay whole. Channels may be split where each is convolved by itself. With several groups, only the
    batch may be split.
    """
    groups = arguments(node)["groups"]
    spatial = range(len(inputs[1]) - 2)
    batch = ["n"] * (len(inputs[0]) - len(spatial) - 1)
    channels, within, out = ("c", "1", "c") if _each_alone(inputs, groups) else ("c^", "c^", "o")
    if groups > 1 and out == "o":
        channels, within, out = "(g^ c^)", "c^", "(g^ o^)"
    places, kernel, results = ([f"{side}{i}^" for i in spatial] for side in "lkm")
    bias = [[out]] * (len(inputs) - 2)
    return write([[*batch, channels, *places], [out, within, *kernel], *bias], [[*batch, out, *results]])


def _each_alone(inputs: Sequence[Shape], groups: int) -> bool:
    return groups > 1 and inputs[1][0] == groups and inputs[1][1] == 1


def convolution_flops(sizes: dict[str, int], node: Node) -> float:
    """One multiplication and one addition for each combination of result, channel within a group, and place of the
    kernel."""
    return 2.0 * prod(size for name, size in sizes.items() if not name.startswith("l"))


def convolution_text(call: WrittenCall) -> str:
    """A device with a part of the channels, each of which is convolved by itself, has as many groups as it has
    channels."""
    channels = call.shape[-1 - int(call.op[4])]  # of conv1d, the last but one
    call.arguments["groups"] = min(call.arguments["groups"], channels)
    return call.fill("F.{op}(*)")


_reads = backward_reads(input="input weight", weight="input weight", bias="input weight")
family(
    "conv1d.default conv1d.padding conv2d.default conv2d.padding", convolution, convolution_text,
    flops=convolution_flops, factors=("input", "weight"), saves=_reads,
)  # fmt: skip
