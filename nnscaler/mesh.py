"""The device mesh: copies of the model, and the axes over which a plan splits the work of one copy. A pipeline has one
for each pipeline rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod
from typing import Any


@dataclass(frozen=True)
class Mesh:
    """The devices of a plan, or of one rank of a pipeline, arranged in a grid.

    sizes     devices along each axis over which a copy of the model is split; called `axis` below is an index into this
    replicas  copies of the model; each trains on its own samples
    first     the global rank of the first device

    Global ranks count the last axis fastest, then the axes before it, then copies. So neighbours on the last axis,
    which exchange most, are in the same node.

    Example: `Mesh((2, 4), replicas=2)` has 16 devices. Rank 13 is of copy 1, at place (1, 1).
    """

    sizes: tuple[int, ...]
    replicas: int = 1
    first: int = 0

    @property
    def plan_ngpus(self) -> int:
        """Devices of one copy of the model."""
        return prod(self.sizes)

    @property
    def runtime_ngpus(self) -> int:
        """All devices."""
        return self.replicas * self.plan_ngpus

    @property
    def ngpus_with_loss(self) -> int:
        """Devices of a copy that compute its loss: all."""
        return self.plan_ngpus

    def sums_gradients(self, micro_batches: int) -> bool:
        """Whether a step has several gradients of a parameter, of its micro-batches or of several devices, which are
        summed in fp32. Otherwise the only one stays as it is."""
        return micro_batches > 1 or self.runtime_ngpus > 1

    @property
    def axes(self) -> range:
        """Indices of the axes."""
        return range(len(self.sizes))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the axes: `devices` for one axis; for two, `inner` groups of neighbours and `outer` groups across
        these."""
        known = {1: ("devices",), 2: ("outer", "inner")}
        return known.get(len(self.sizes)) or tuple(f"axis{axis}" for axis in self.axes)

    def coordinates(self, rank: int) -> tuple[int, tuple[int, ...]]:
        """(copy, place on each axis) of a global rank."""
        rank -= self.first
        place = []
        for size in reversed(self.sizes):
            rank, at = divmod(rank, size)
            place.append(at)
        return rank, tuple(reversed(place))

    def devices(self, *axes: int) -> int:
        """How many devices a group along some axes has."""
        return prod(self.sizes[axis] for axis in axes)

    def on_a_node(self, devices_per_node: int, axes: tuple[int, ...], copies: bool = False) -> int:
        """The fewest devices of a group along some axes that lie together on a node: all of it, where every such group
        lies within a node.

        copies  whether a group goes over all copies of the model too
        """
        return _on_a_node(self, devices_per_node, axes, copies)

    def of_copy(self, copy: int) -> list[int]:
        """The global ranks of the devices of a copy of the model, in the order of their places."""
        return list(self.groups(tuple(self.axes)))[copy]

    def groups(self, axes: tuple[int, ...], copies: bool = False) -> Iterator[list[int]]:
        """The global ranks of each group along some axes. `copies`: as above"""
        sizes = (self.replicas, *self.sizes)
        along = {axis + 1 for axis in axes} | ({0} if copies else set())
        strides = [prod(sizes[dim + 1 :]) for dim in range(len(sizes))]

        def places(dims: list[int]) -> Iterator[int]:
            for place in product(*(range(sizes[dim]) for dim in dims)):
                yield sum(at * strides[dim] for dim, at in zip(dims, place))

        inside = list(places([dim for dim in range(len(sizes)) if dim in along]))
        for begin in places([dim for dim in range(len(sizes)) if dim not in along]):
            yield [self.first + begin + at for at in inside]

    def to_json(self) -> dict[str, Any]:
        """As plan.json has it: sizes and names of the axes, and the number of copies."""
        return {"sizes": list(self.sizes), "names": list(self.names), "replicas": self.replicas}

    def __str__(self) -> str:
        return " x ".join([_copies(self.replicas), *map(axis_text, self.sizes, self.names)])


@dataclass(frozen=True)
class PipelineMesh:
    """The devices of a pipeline: a mesh for each pipeline rank.

    Their global ranks follow one another. So pipeline ranks, which exchange least, are far apart.
    """

    ranks: tuple[Mesh, ...]

    @staticmethod
    def of(sizes: Iterable[tuple[int, ...]], replicas: int) -> PipelineMesh:
        """The mesh whose ranks have axes of these sizes."""
        ranks: list[Mesh] = []
        for each in sizes:
            ranks.append(Mesh(each, replicas, ranks[-1].first + ranks[-1].runtime_ngpus if ranks else 0))
        return PipelineMesh(tuple(ranks))

    @property
    def replicas(self) -> int:
        """Copies of the model."""
        return self.ranks[0].replicas

    @property
    def plan_ngpus(self) -> int:
        """Devices of one copy of the model."""
        return sum(mesh.plan_ngpus for mesh in self.ranks)

    @property
    def runtime_ngpus(self) -> int:
        """All devices."""
        return sum(mesh.runtime_ngpus for mesh in self.ranks)

    @property
    def ngpus_with_loss(self) -> int:
        """Devices of a copy that compute its loss. Where the last stage is not on the last rank, ranks are even."""
        return self.ranks[-1].plan_ngpus

    @property
    def is_even(self) -> bool:
        """Whether all ranks are arranged alike."""
        return len({mesh.sizes for mesh in self.ranks}) == 1

    def rank_of(self, rank: int) -> int:
        """The pipeline rank of a global rank."""
        return max(index for index, mesh in enumerate(self.ranks) if mesh.first <= rank)

    def __str__(self) -> str:
        ranks = f"{len(self.ranks)} pipeline ranks"
        return " x ".join([_copies(self.replicas), ranks, devices_text([mesh.sizes for mesh in self.ranks])])


def devices_text(ranks: Sequence[Sequence[int]]) -> str:
    """The devices of a pipeline rank, for people; or of each, where they are not alike, such as `2 + 1 devices`.
    `ranks`: sizes of the axes of each"""
    alike = [" x ".join(map(axis_text, sizes, Mesh(tuple(sizes)).names)) for sizes in ranks]
    return alike[0] if len(set(alike)) == 1 else f"{' + '.join(str(prod(sizes)) for sizes in ranks)} devices"


def _copies(replicas: int) -> str:
    return f"{replicas} {'copy' if replicas == 1 else 'copies'}"


@lru_cache(4096)
def _on_a_node(mesh: Mesh, devices_per_node: int, axes: tuple[int, ...], copies: bool) -> int:
    return min(min(Counter(rank // devices_per_node for rank in ranks).values()) for ranks in mesh.groups(axes, copies))


def axis_text(size: int, name: str) -> str:
    """An axis of the mesh for people, such as `8 devices` or `4 inner`."""
    return "1 device" if (size, name) == (1, "devices") else f"{size} {name}"


def meshes(plan_ngpus: int, replicas: int, devices_per_node: int) -> list[Mesh]:
    """The meshes to try: one axis; and two axes, of which the second stays inside a node."""
    inner = [size for size in range(2, plan_ngpus) if plan_ngpus % size == 0]
    fitting = [size for size in inner if plan_ngpus <= devices_per_node or devices_per_node % size == 0]
    return [Mesh((plan_ngpus,), replicas), *(Mesh((plan_ngpus // size, size), replicas) for size in fitting)]
