"""How a tensor lies on the device mesh, in the words of PyTorch's DTensor.

A tensor has one placement for each mesh axis. Where one dimension is sharded on several axes, the earlier axis is the
outer one: device (i, j) of an m x n mesh holds slice i * n + j.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Shard:
    """Each device of the axis holds one slice of tensor dimension `dim`; slices are equal and contiguous. Written
    S(dim)."""

    dim: int

    def __str__(self) -> str:
        return f"S({self.dim})"


@dataclass(frozen=True)
class Replicate:
    """Each device of the axis holds the whole tensor. Written R, or R* with `partial_grad`.

    partial_grad  False: each device also has the whole gradient. True: each device has a term of the gradient, because
                  each uses the tensor for a part of the work; the gradient is the sum of these terms.
    """

    partial_grad: bool = False

    def __str__(self) -> str:
        return "R*" if self.partial_grad else "R"


@dataclass(frozen=True)
class Partial:
    """Each device of the axis holds a term of a sum, which is the tensor. Written P."""

    def __str__(self) -> str:
        return "P"


Placement = Shard | Replicate | Partial
Placements = tuple[Placement, ...]  # a layout: one placement for each mesh axis

REPLICATE = Replicate()
SHARED = Replicate(partial_grad=True)
PARTIAL = Partial()


def parse_placement(text: str) -> Placement:
    """The placement of a text: `S(1)`, `R`, `R*` or `P`. Raises ValueError for any other."""
    plain: dict[str, Placement] = {"R": REPLICATE, "R*": SHARED, "P": PARTIAL}
    match = re.fullmatch(r"S\((\d+)\)", text)
    if match is None and text not in plain:
        raise ValueError(f"placement is {text!r}; allowed are 'S(dim)', 'R', 'R*' and 'P'")
    return Shard(int(match[1])) if match else plain[text]


def parse_placements(text: str) -> Placements:
    """The layout of a text that `format_placements` wrote. Raises ValueError for any other."""
    return tuple(parse_placement(one) for one in text.split(","))


def format_placements(placements: Placements) -> str:
    """A layout as text, such as `S(1),R`."""
    return ",".join(str(placement) for placement in placements)


def local_shape(shape: tuple[int, ...], placements: Placements, axis_sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of one device's part of a tensor of whole shape `shape`. Sharded dimensions must divide evenly."""
    local = list(shape)
    for placement, size in zip(placements, axis_sizes, strict=True):
        if isinstance(placement, Shard):
            assert local[placement.dim] % size == 0, (shape, placements, axis_sizes)
            local[placement.dim] //= size
    return tuple(local)


def shards(placements: Placements, dim: int, axis_sizes: tuple[int, ...]) -> int:
    """Into how many slices a dimension of a tensor is sharded."""
    return prod(size for placement, size in zip(placements, axis_sizes, strict=True) if placement == Shard(dim))
