"""Parameters that several stages of a pipeline use, such as an embedding that is the head too.

Each stage has the parameter, and the owners that its own devices are: all of them, since it is whole on each. The
gradients of all stages are added up for the owners in each stage, so that all make the same update.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nnscaler.mesh import PipelineMesh
from nnscaler.processes import from_all
from nnscaler.runtime.axes import Axes
from nnscaler.runtime.buckets import Bucket


@dataclass(frozen=True)
class SharedAlike:
    """A part of a parameter that several stages use, whose owners in each stage own parts alike.

    buckets  it lies in, one for each of this rank's stages that use it
    group    of all ranks whose stages use it; None: only this rank
    """

    buckets: tuple[Bucket, ...]
    group: dist.ProcessGroup | None

    def add_gradients(self) -> None:
        """Gives every stage the sum of all stages' gradients, so that all make the same update."""
        total = self.buckets[0].gradient
        for bucket in self.buckets[1:]:
            total += bucket.gradient
        if self.group is not None:
            dist.all_reduce(total, group=self.group)
        for bucket in self.buckets[1:]:
            bucket.gradient.copy_(total)


def group_across(axes: Axes, mesh: PipelineMesh, pipeline_ranks: tuple[int, ...]) -> dist.ProcessGroup | None:
    """The group of those devices on these pipeline ranks, which are even, that have this device's place on the other
    axes."""
    if len(pipeline_ranks) == 1:
        return None
    found = None
    for ranks in zip(
        *(range(one.first, one.first + one.runtime_ngpus) for one in map(mesh.ranks.__getitem__, pipeline_ranks))
    ):
        group = dist.new_group(list(ranks))
        if axes.rank in ranks:
            found = group
    return found


@dataclass(frozen=True)
class _Owned:
    """A range of a parameter's elements that a device owns.

    stage  the pipeline rank of the device
    rank   the global rank
    """

    stage: int
    rank: int
    start: int
    stop: int

    def common(self, other: _Owned) -> slice | None:
        """What both own, within this one."""
        start, stop = max(self.start, other.start), min(self.stop, other.stop)
        return slice(start - self.start, stop - self.start) if start < stop else None


class SharedUnevenly:
    """A parameter that stages on unequal numbers of devices use, each of which owns other parts of it.

    A device sends its gradients to those that own the same elements in other stages. Each adds them up in the order of
    the stages, so that all have the same sum to the last bit.
    """

    def __init__(self, name: str, buckets: Sequence[Bucket], axes: Axes) -> None:
        """Collective. `buckets`: those in which the parameter lies alone, if this rank has it"""
        self._mine: list[tuple[_Owned, Tensor]] = []
        for bucket in buckets:
            (slot,) = bucket.slots
            assert slot.name == name
            owned = bucket.owned_range
            start, stop = max(owned.start, slot.start), min(owned.stop, slot.stop)
            if start < stop:
                own = _Owned(axes.pipeline.rank, axes.rank, start - slot.start, stop - slot.start)
                self._mine.append((own, bucket.gradient[start - owned.start : stop - owned.start]))
        every = from_all([own for own, _ in self._mine])
        self._others = sorted(
            (own for of_rank in every for own in of_rank if own.stage != axes.pipeline.rank),
            key=lambda own: (own.stage, own.start),
        )

    def add_gradients(self) -> None:
        """Gives every owner the sum of all stages' gradients."""
        operations: list[dist.P2POp] = []
        terms = [{own.stage: gradient} for own, gradient in self._mine]  # of each stage
        for (own, gradient), of_stages in zip(self._mine, terms):
            for other in self._others:
                if (common := own.common(other)) is not None:
                    there = of_stages.setdefault(other.stage, torch.empty_like(gradient))
                    operations.append(dist.P2POp(dist.isend, gradient[common], other.rank))
                    operations.append(dist.P2POp(dist.irecv, there[common], other.rank))
        for work in dist.batch_isend_irecv(operations) if operations else ():
            work.wait()
        for (_, gradient), of_stages in zip(self._mine, terms):
            first, *others = (of_stages[stage] for stage in sorted(of_stages))
            total = first.clone()
            for term in others:
                total += term
            gradient.copy_(total)
