"""The process groups of a mesh."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, combinations

import torch
import torch.distributed as dist

from nnscaler.errors import UserError
from nnscaler.mesh import Mesh, PipelineMesh
from nnscaler.placement import Placements, Shard
from nnscaler.runtime.axis import Axis
from nnscaler.runtime.gathering import Gathers
from nnscaler.runtime.host import HostMemory
from nnscaler.runtime.later import Later


class Axes:
    """The groups of a mesh that this process belongs to. Every rank builds them, in the same order.

    mesh           of all devices, or of those of this process's pipeline rank
    whole          of all devices
    devices        the group of all devices of a copy; of a pipeline, of those on this rank
    inner, outer   of a mesh of two axes, the groups along each; see `Mesh.names`
    pipeline       the pipeline ranks; its group has one device of each
    crossing       the group of those among which what crosses between stages is sent; None: there is no pipeline
    copies         the group of devices that do the same part of the work for other copies of the model
    gathers        gathers weights that are stored in shards, for generated code
    later          computes gradients of weights later, for generated code
    host           keeps what backward needs in the host's memory, for generated code
    replica        which copy of the model this rank is of
    place          this rank's place on each mesh axis

    Raises UserError where another number of processes runs than the mesh has devices.
    """

    gathers: Gathers
    host: HostMemory
    later: Later
    devices: Axis
    inner: Axis
    outer: Axis

    def __init__(self, mesh: Mesh | PipelineMesh, device: torch.device) -> None:
        world = dist.get_world_size() if dist.is_initialized() else 1
        if world != mesh.runtime_ngpus:
            raise UserError(f"the plan is for runtime_ngpus={mesh.runtime_ngpus} processes; started are {world}")
        self.whole = mesh
        self.device = device
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        ranks = mesh.ranks if isinstance(mesh, PipelineMesh) else (mesh,)
        rank = mesh.rank_of(self.rank) if isinstance(mesh, PipelineMesh) else 0
        self.mesh = ranks[rank]
        self.replica, self.place = self.mesh.coordinates(self.rank)
        self._groups: dict[tuple[Mesh, tuple[int, ...], bool, bool], Axis] = {}
        self._axes: list[Axis] = []
        for one in ranks:
            axes = [self._group(one, (axis,)) for axis in one.axes]
            devices, copies = self._group(one, tuple(one.axes)), self._group(one, (), True)
            if one is self.mesh:
                self._axes, self.devices, self.copies = axes, devices, copies
        for name, axis in zip(self.mesh.names, self._axes):
            setattr(self, name, axis)
        if len(ranks) > 1:
            # Other stages may need other groups of owners, but a group is made by all ranks together.
            for one in ranks:
                for some in chain.from_iterable(combinations(one.axes, count) for count in range(len(one.axes) + 1)):
                    self._group(one, some, True, owners=True)
        self.pipeline = Axis(len(ranks), rank, None)
        self.crossing: dist.ProcessGroup | None = None
        if isinstance(mesh, PipelineMesh) and len(ranks) > 1:
            self._connect(mesh)

    def __getitem__(self, axis: int) -> Axis:
        return self._axes[axis]

    def __iter__(self) -> Iterable[Axis]:
        return iter(self._axes)

    def owners(self, layout: Placements) -> Axis:
        """The ranks that hold the same shard of a parameter that is stored so.

        Their group is another one than those of the same ranks above. What a group exchanges runs in the order in which
        it was started. So the next forward would wait, in its first exchange, until all weights are updated and
        published; and backward for gradients that are on their way.
        """
        replicated = tuple(axis for axis, place in enumerate(layout) if not isinstance(place, Shard))
        return self._group(self.mesh, replicated, True, owners=True)

    def _group(self, mesh: Mesh, axes: tuple[int, ...], copies: bool = False, owners: bool = False) -> Axis:
        """This process's group along some axes taken as one, where the last axis's ranks are neighbours.

        copies  whether it goes over all copies too
        owners  whether it is for owners alone
        """
        axes = tuple(axis for axis in axes if mesh.sizes[axis] > 1)
        copies = copies and mesh.replicas > 1
        if not axes and not copies:
            return Axis(1, 0, None)
        key = (mesh, axes, copies, owners)
        if key not in self._groups:
            groups = list(mesh.groups(axes, copies))
            group, _ = dist.new_subgroups_by_enumeration(groups)
            mine = next((ranks for ranks in groups if self.rank in ranks), [self.rank])
            self._groups[key] = Axis(len(mine), mine.index(self.rank), group)
        return self._groups[key]

    def _connect(self, mesh: PipelineMesh) -> None:
        """Makes the groups across pipeline ranks. A lane has a device of each rank: that of the same place, or the last
        where a rank has fewer."""
        of_ranks = [list(one.groups(tuple(one.axes))) for one in mesh.ranks]  # of each rank, the devices of each copy
        for copies in zip(*of_ranks):
            for place in range(max(map(len, copies))):
                lane = [devices[min(place, len(devices) - 1)] for devices in copies]
                group = dist.new_group(lane)
                if self.rank in lane and copies[self.pipeline.rank].index(self.rank) == place:
                    self.pipeline = Axis(len(lane), self.pipeline.rank, group)
            if not mesh.is_even:
                every = [rank for devices in copies for rank in devices]
                group = dist.new_group(every)
                self.crossing = group if self.rank in every else self.crossing
        self.crossing = self.crossing or self.pipeline.group
