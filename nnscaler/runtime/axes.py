"""The process groups of a mesh."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, combinations
from math import prod

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from nnscaler.errors import UserError
from nnscaler.mesh import Mesh
from nnscaler.placement import Placements, Shard
from nnscaler.runtime.axis import Axis
from nnscaler.runtime.gathering import Gathers
from nnscaler.runtime.host import HostMemory
from nnscaler.runtime.later import Later


class Axes:
    """The groups of `mesh` that this process belongs to. Every rank builds them, in the same order.

    devices        the group of all devices of a copy
    inner, outer   of a mesh of two axes, the groups along each; see `Mesh.names`
    pipeline       the group of pipeline ranks
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

    def __init__(self, mesh: Mesh, device: torch.device) -> None:
        world = dist.get_world_size() if dist.is_initialized() else 1
        if world != mesh.runtime_ngpus:
            raise UserError(f"the plan is for runtime_ngpus={mesh.runtime_ngpus} processes; started are {world}")
        self.mesh = mesh
        self.device = device
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.replica, self.place = mesh.coordinates(self.rank)
        axes = mesh.names
        self._names: tuple[str, ...] = ("replica", *axes)
        self._sizes: tuple[int, ...] = (mesh.replicas, *mesh.sizes)
        if mesh.pipeline > 1:
            self._names, self._sizes = ("pipeline", *self._names), (mesh.pipeline, *self._sizes)
        self._device_mesh: DeviceMesh | None = None
        if world > 1:
            self._device_mesh = init_device_mesh(device.type, self._sizes, mesh_dim_names=self._names)
        self._groups: dict[tuple[str, ...], Axis] = {}
        self._groups_of_owners: dict[tuple[str, ...], Axis] = {}
        self._axes = [self._axis([name]) for name in axes]
        self.devices = self._axis(list(axes))
        for name, axis in zip(axes, self._axes):
            setattr(self, name, axis)
        self.pipeline = self._axis(["pipeline"]) if mesh.pipeline > 1 else Axis(1, 0, None)
        self.copies = self._axis(["replica"])
        if mesh.pipeline > 1:
            # Other stages may need other groups of owners, but a group is made by all ranks together.
            for names in chain.from_iterable(combinations(axes, count) for count in range(len(axes) + 1)):
                self._owners(["replica", *names])

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
        replicated = [self.mesh.names[axis] for axis, place in enumerate(layout) if not isinstance(place, Shard)]
        return self._owners(["replica", *replicated])

    def _owners(self, names: list[str]) -> Axis:
        """A group over several mesh dimensions, for owners alone."""
        key = self._longer(names)
        if key and key not in self._groups_of_owners:
            dims = [self._names.index(name) for name in key]
            ranks = torch.arange(prod(self._sizes)).view(self._sizes).movedim(dims, tuple(range(len(dims))))
            groups = ranks.reshape(prod(self._sizes[dim] for dim in dims), -1).t().tolist()
            mine = next(group for group in groups if self.rank in group)
            group, _ = dist.new_subgroups_by_enumeration(groups)
            self._groups_of_owners[key] = Axis(len(mine), mine.index(self.rank), group)
        return self._groups_of_owners[key] if key else Axis(1, 0, None)

    def _axis(self, names: list[str]) -> Axis:
        """The group over several mesh dimensions taken as one, where the last dimension's ranks are neighbours."""
        key = self._longer(names)
        if not key:
            return Axis(1, 0, None)
        if key not in self._groups:
            assert self._device_mesh is not None
            part = self._device_mesh[key if len(key) > 1 else key[0]]
            part = part._flatten("_".join(key)) if len(key) > 1 else part
            self._groups[key] = Axis(part.size(), part.get_local_rank(), part.get_group())
        return self._groups[key]

    def _longer(self, names: list[str]) -> tuple[str, ...]:
        """Those of some mesh dimensions that have more than one rank."""
        return tuple(name for name in names if self._sizes[self._names.index(name)] > 1)
