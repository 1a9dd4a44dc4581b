"""Which part of a parameter a rank holds, as boxes of the whole tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from nnscaler.mesh import Mesh
from nnscaler.placement import Placements, Shard, local_shape, parse_placements


@dataclass(frozen=True)
class Box:
    """A rectangular part of a tensor: where it begins in each dimension, and its size there."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def slices(self) -> tuple[slice, ...]:
        """The box as an index: `tensor[box.slices]`."""
        return tuple(slice(offset, offset + size) for offset, size in zip(self.offsets, self.sizes))

    def shifted(self, offsets: tuple[int, ...]) -> Box:
        """The same box, further on by so many places in each dimension."""
        return Box(tuple(a + b for a, b in zip(self.offsets, offsets)), self.sizes)

    def common(self, other: Box) -> Box | None:
        """What both boxes have; None: nothing."""
        begins = tuple(map(max, self.offsets, other.offsets))
        ends = (min(a + b, c + d) for a, b, c, d in zip(self.offsets, self.sizes, other.offsets, other.sizes))
        sizes = tuple(end - begin for begin, end in zip(begins, ends))
        return Box(begins, sizes) if all(size > 0 for size in sizes) else None


@dataclass(frozen=True)
class ParameterSpec:
    """A parameter of the whole model, and how each rank holds it.

    shape           of the whole parameter
    layout          in which it is stored
    trained         whether it is trained
    exchanged_once  True: its gradient is summed whole over the micro-batches of a step, and exchanged after the last.
                    False: it is exchanged in each micro-batch, and a rank sums the part that it owns.
    master_only     only its master weight is stored, in fp32; it is cast to `dtype` when it is gathered
    gathered_in_fp8  somewhere, it is gathered in fp8
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: Placements
    trained: bool
    exchanged_once: bool = False
    master_only: bool = False
    gathered_in_fp8: bool = False

    @property
    def stored_dtype(self) -> torch.dtype:
        """The type in which a rank holds it."""
        return torch.float32 if self.master_only else self.dtype

    @staticmethod
    def from_json(fields: Mapping[str, Any]) -> ParameterSpec:
        """From the entry of a parameter in plan.json."""
        layout = parse_placements(fields["layout"])
        ways = {way: fields[way] for way in ("trained", "exchanged_once", "master_only", "gathered_in_fp8")}
        return ParameterSpec(tuple(fields["shape"]), getattr(torch, fields["dtype"]), layout, **ways)

    def box(self, mesh: Mesh, place: tuple[int, ...]) -> Box:
        """The part that the device at this place on the mesh axes holds."""
        return box_of(self.shape, self.layout, mesh, place)


def box_of(shape: tuple[int, ...], layout: Placements, mesh: Mesh, place: tuple[int, ...]) -> Box:
    """The part of a tensor that the device at this place on the mesh axes holds."""
    offsets = [0] * len(shape)
    left = list(shape)
    for placement, devices, at in zip(layout, mesh.sizes, place, strict=True):
        if isinstance(placement, Shard):
            left[placement.dim] //= devices
            offsets[placement.dim] += at * left[placement.dim]
    return Box(tuple(offsets), local_shape(shape, layout, mesh.sizes))


@dataclass(frozen=True)
class Part:
    """A part of a tensor that a device sends to another. Both have it.

    sender, receiver  global ranks
    box               of the whole tensor
    """

    sender: int
    receiver: int
    box: Box


def parts(before: Mapping[int, Box], after: Mapping[int, Box]) -> list[Part]:
    """What is sent so that devices have other boxes of a tensor: global ranks -> their boxes before, and after.

    Where several devices have a part, they take turns.
    """
    holders: dict[Box, list[int]] = {}
    for rank, box in before.items():
        holders.setdefault(box, []).append(rank)
    return [
        Part(ranks[place % len(ranks)], receiver, common)
        for place, (receiver, wanted) in enumerate(after.items())
        for box, ranks in holders.items()
        if (common := box.common(wanted)) is not None
    ]


def boxes_of_copy(shape: tuple[int, ...], layout: Placements, mesh: Mesh, copy: int) -> dict[int, Box]:
    """Global rank -> the part of a tensor that it holds, of the devices of a copy of the model."""
    return {rank: box_of(shape, layout, mesh, mesh.coordinates(rank)[1]) for rank in mesh.of_copy(copy)}


def flat_range_boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[int, Box]]:
    """Covers the elements [start, stop) of a contiguous tensor with boxes, in order.

    Yields (index of the box's first element in the flat tensor, box). At most 2 * rank - 1 boxes are needed, where the
    range cuts rows.
    """
    if start >= stop:
        return
    if not shape:
        yield 0, Box((), ())
        return
    row = prod(shape[1:])
    first, last = -(-start // row), stop // row
    if first > last:  # inside one row
        yield from _in_row(shape, first - 1, start, stop)
        return
    if start < first * row:
        yield from _in_row(shape, first - 1, start, first * row)
    if first < last:
        yield first * row, Box((first, *(0 for _ in shape[1:])), (last - first, *shape[1:]))
    if last * row < stop:
        yield from _in_row(shape, last, last * row, stop)


def _in_row(shape: tuple[int, ...], index: int, start: int, stop: int) -> Iterator[tuple[int, Box]]:
    begin = index * prod(shape[1:])
    for at, box in flat_range_boxes(shape[1:], start - begin, stop - begin):
        yield begin + at, Box((index, *box.offsets), (1, *box.sizes))
