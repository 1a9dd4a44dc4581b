"""The device mesh: pipeline ranks, replicas of the plan, and the axes that the plan splits work over."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any


@dataclass(frozen=True)
class Mesh:
    """`replicas` copies of a plan over axes of `sizes` devices each; ranks count the last axis fastest.

    Each replica trains on its own samples. `axis` below is an index into `sizes`. A plan with a pipeline has so many
    devices on each of `pipeline` ranks, and pipeline ranks count slowest: what is said least often goes between nodes.
    """

    sizes: tuple[int, ...]
    replicas: int = 1
    pipeline: int = 1

    @property
    def plan_ngpus(self) -> int:
        """Devices of one copy of the model."""
        return self.pipeline * prod(self.sizes)

    @property
    def runtime_ngpus(self) -> int:
        return self.replicas * self.plan_ngpus

    @property
    def axes(self) -> range:
        return range(len(self.sizes))

    @property
    def names(self) -> tuple[str, ...]:
        """Of the axes: the devices of a copy are one group, or `inner` groups of neighbours and `outer` ones across."""
        known = {1: ("devices",), 2: ("outer", "inner")}
        return known.get(len(self.sizes)) or tuple(f"axis{axis}" for axis in self.axes)

    def coordinates(self, rank: int) -> tuple[int, tuple[int, ...]]:
        """(replica, place on each axis) of a rank."""
        rank %= self.replicas * prod(self.sizes)
        place = []
        for size in reversed(self.sizes):
            rank, at = divmod(rank, size)
            place.append(at)
        return rank, tuple(reversed(place))

    def pipeline_rank(self, rank: int) -> int:
        """Place of a rank in the pipeline."""
        return rank // (self.replicas * prod(self.sizes))

    def stride(self, axis: int) -> int:
        """Distance in ranks between neighbours on `axis`."""
        return prod(self.sizes[axis + 1 :])

    def spans_nodes(self, axis: int, devices_per_node: int) -> bool:
        """Whether a group along `axis` has devices of more than one node."""
        return self.stride(axis) * self.sizes[axis] > devices_per_node

    def to_json(self) -> dict[str, Any]:
        """As plan.json has it: the axes, and how many copies of them there are."""
        return {"sizes": list(self.sizes), "names": list(self.names), "replicas": self.replicas}

    def __str__(self) -> str:
        copies = f"{self.replicas} {'copy' if self.replicas == 1 else 'copies'}"
        pipeline = [f"{self.pipeline} pipeline ranks"] if self.pipeline > 1 else []
        return " x ".join([copies, *pipeline, *(f"{size} {name}" for size, name in zip(self.sizes, self.names))])


def meshes(plan_ngpus: int, replicas: int, devices_per_node: int) -> list[Mesh]:
    """Every mesh of one and two axes, of which the second stays inside a node."""
    inner = [size for size in range(2, min(plan_ngpus, devices_per_node + 1)) if plan_ngpus % size == 0]
    fitting = [size for size in inner if plan_ngpus <= devices_per_node or devices_per_node % size == 0]
    return [Mesh((plan_ngpus,), replicas), *(Mesh((plan_ngpus // size, size), replicas) for size in fitting)]
