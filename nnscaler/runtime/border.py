"""What crosses from a stage to the next, as a device sends and receives it.

The devices of both stages hold the same tensors, each a box of them; how many devices there are, and which boxes they
hold, may differ. A device is sent the parts of its boxes by those that have them, and puts them together. Where several
have a part, they take turns. Gradients go back likewise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nnscaler.mesh import Mesh, PipelineMesh
from nnscaler.placement import parse_placements
from nnscaler.runtime.axes import Axes
from nnscaler.shards import Box, Part, boxes_of_copy, parts

Crossing = Sequence[Mapping[str, Any]]  # the tensors that cross, as plan.json has them


class Way:
    """One way over a border between two stages: of the tensors that cross, or of their gradients back.

    A device that sends to another also gets something from it on the way back, and the reverse, if it is only a number
    that says nothing: torch may otherwise look for both in other places. (It takes one communicator where it starts
    sends alone or receives alone, and another one where it starts both at once, as it does for a pair at once.)

    parts  of each tensor, between all devices of a copy
    held   of each tensor, the box that this device holds
    empty  (sender, receiver) of those that say nothing
    """

    def __init__(
        self, parts: Sequence[Sequence[Part]], held: Sequence[Box], empty: Sequence[tuple[int, int]], axes: Axes
    ) -> None:
        every = [(index, part) for index, of_tensor in enumerate(parts) for part in of_tensor]
        self._sends = [(index, part) for index, part in every if part.sender == axes.rank]
        self._receives = [(index, part) for index, part in every if part.receiver == axes.rank]
        self._empty_to = [receiver for sender, receiver in empty if sender == axes.rank]
        self._empty_from = [sender for sender, receiver in empty if receiver == axes.rank]
        self._held, self._axes = held, axes

    def send(self, tensors: Sequence[Tensor | None]) -> list[dist.P2POp]:
        """What sends this device's boxes. `tensors`: may be None where they are no part of what is sent"""
        found = [(part.receiver, self._within(tensors, at, part).contiguous()) for at, part in self._sends]
        found += [(receiver, self._nothing()) for receiver in self._empty_to]
        return [dist.P2POp(dist.isend, tensor, peer, self._axes.crossing) for peer, tensor in found]

    def receive(self, buffers: Sequence[Tensor | None]) -> Received:
        """What receives this device's boxes into buffers."""
        came, coming = [], []
        for at, part in self._receives:
            place = self._within(buffers, at, part)
            here = place if place.is_contiguous() else torch.empty_like(place, memory_format=torch.contiguous_format)
            coming.append((part.sender, here))
            if here is not place:
                came.append((place, here))
        coming += [(sender, self._nothing()) for sender in self._empty_from]
        group = self._axes.crossing
        return Received([dist.P2POp(dist.irecv, tensor, peer, group) for peer, tensor in coming], came)

    def _within(self, tensors: Sequence[Tensor | None], at: int, part: Part) -> Tensor:
        """A part of what this device holds of a tensor."""
        tensor = tensors[at]
        assert tensor is not None
        begin = tuple(-offset for offset in self._held[at].offsets)
        return tensor.detach()[part.box.shifted(begin).slices]

    def _nothing(self) -> Tensor:
        return torch.zeros(1, device=self._axes.device)


@dataclass(frozen=True)
class Received:
    """What is being received.

    operations  that receive it
    scattered   (where it belongs, where it comes), of what does not lie in one piece
    """

    operations: list[dist.P2POp]
    scattered: list[tuple[Tensor, Tensor]]

    @torch.no_grad()
    def put(self) -> None:
        """Puts together what has come."""
        for place, here in self.scattered:
            place.copy_(here)


@dataclass(frozen=True)
class Border:
    """Between a stage of this device and the next stage, or the one before.

    there, back  the ways of tensors to the next stage, and of their gradients from it
    """

    there: Way
    back: Way


def border(crossing: Crossing, sender: Mesh, receiver: Mesh, axes: Axes) -> Border:
    """The border between the stages of two pipeline ranks, of which this device is on one."""
    forward: list[list[Part]] = []
    backward: list[list[Part]] = []
    held: list[Box] = []
    for tensor in crossing:
        before, after = (
            boxes_of_copy(tuple(tensor["whole"]), parse_placements(tensor[side]), mesh, axes.replica)
            for mesh, side in ((sender, "sent"), (receiver, "received"))
        )
        held.append((before if axes.rank in before else after)[axes.rank])
        forward.append(parts(before, after))
        backward.append(parts(after, before) if tensor["gradient"] else [])
    there = {(part.sender, part.receiver) for of_tensor in forward for part in of_tensor}
    back = {(part.receiver, part.sender) for of_tensor in backward for part in of_tensor}
    answers = [(receiver, sender) for sender, receiver in sorted(there - back)]
    return Border(Way(forward, held, sorted(back - there), axes), Way(backward, held, answers, axes))


def greet(mesh: PipelineMesh, axes: Axes) -> None:
    """Lets each pair of devices of neighbouring pipeline ranks exchange something, one pair after the other.

    Connections are made where they are first used, for which both have to wait for each other; in a schedule they would
    wait in another order. Collective.
    """
    assert axes.crossing is not None
    number = torch.zeros(1, device=axes.device)
    for group in (None, axes.crossing):
        dist.all_reduce(number, group=group)
    for before, after in zip(mesh.ranks, mesh.ranks[1:]):
        for sender in before.of_copy(axes.replica):
            for receiver in after.of_copy(axes.replica):
                if axes.rank == sender:
                    dist.send(number, receiver, group=axes.crossing)
                elif axes.rank == receiver:
                    dist.recv(number, sender, group=axes.crossing)
