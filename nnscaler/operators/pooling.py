"""Pools, and changes of an image's size: they look at neighbouring places, and at each channel by itself."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import prod

from nnscaler.annotation import Shape
from nnscaler.graph import Node, TensorMeta
from nnscaler.operators.annotating import write
from nnscaler.operators.registry import backward_reads, family, save_inputs, save_nothing


def by_channel(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    """[n..., places...] -> [n..., results...]: as many dimensions of places as the operator's name says."""
    (places,) = map(int, re.findall(r"(\d)d", node.op))
    batch = [f"n{i}" for i in range(len(inputs[0]) - places)]
    before, after = ([f"{side}{i}^" for i in range(places)] for side in "lm")
    return write([[*batch, *before]], [[*batch, *after]] * len(outputs))


def shuffled(node: Node, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> str:
    """Channels become places inside each place."""
    batch = [f"n{i}" for i in range(len(inputs[0]) - 3)]
    return write([[*batch, "(c y^ x^)", "h", "w"]], [[*batch, "c", "(h y^)", "(w x^)"]])


def _indices(sizes: dict[str, int], node: Node, inputs: Sequence[TensorMeta]) -> float:
    """Where each maximum comes from: int64."""
    return 8.0 * prod(size for name, size in sizes.items() if not name.startswith("l"))


def _saves_of_average(node: Node, inputs: Sequence[TensorMeta], outputs: Sequence[TensorMeta]) -> list[str]:
    """An average over all places is a mean, which saves nothing."""
    return [] if outputs[0].shape[-2:] == (1, 1) else save_inputs(node, inputs, outputs)


family(
    "max_pool1d.default max_pool2d.default max_pool3d.default", by_channel, "F.{op}(*)",
    saves=backward_reads(self="self"), keeps=_indices,
)  # fmt: skip
family(
    "avg_pool1d.default avg_pool2d.default avg_pool3d.default", by_channel, "F.{op}(*)",
    saves=backward_reads(self="self"),
)  # fmt: skip
family("adaptive_avg_pool2d.default", by_channel, "F.{op}({self}, {output_size})", saves=_saves_of_average)
family(
    "upsample_nearest1d.vec upsample_nearest2d.vec upsample_nearest3d.vec", by_channel,
    "F.interpolate({input}, {output_size}, {scale_factors})", saves=save_nothing,
)  # fmt: skip
family(
    "upsample_bilinear2d.vec", by_channel,
    'F.interpolate({input}, {output_size}, {scale_factors}, "bilinear", {align_corners})', saves=save_nothing,
)  # fmt: skip
family("pixel_shuffle.default", shuffled, "F.{op}(*)", saves=save_nothing)
