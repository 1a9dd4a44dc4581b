"""Which ranks form which groups, on meshes whose axes are all of other sizes; without the other ranks."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from nnscaler.errors import UserError
from nnscaler.mesh import Mesh
from nnscaler.placement import REPLICATE, SHARED, Shard
from nnscaler.runtime import axes as module
from nnscaler.runtime.axes import Axes


class Grid:
    """As torch's device mesh of one rank: a group is the tuple of its ranks."""

    def __init__(self, ranks: torch.Tensor, names: tuple[str, ...], mine: int) -> None:
        self.ranks, self.names, self.mine = ranks, names, mine

    def __getitem__(self, key: str | tuple[str, ...]) -> Grid:
        wanted = (key,) if isinstance(key, str) else key
        assert wanted == tuple(name for name in self.names if name in wanted), "in the order of the mesh"
        place = (self.ranks == self.mine).nonzero()[0].tolist()
        index = tuple(slice(None) if name in wanted else at for name, at in zip(self.names, place))
        return Grid(self.ranks[index], wanted, self.mine)

    def _flatten(self, name: str) -> Grid:
        return Grid(self.ranks.flatten(), (name,), self.mine)

    def size(self) -> int:
        assert self.ranks.dim() == 1
        return len(self.ranks)

    def get_local_rank(self) -> int:
        return self.ranks.tolist().index(self.mine)

    def get_group(self) -> tuple[int, ...]:
        return tuple(self.ranks.tolist())


MESHES = [
    Mesh((2, 3), 2, 3), Mesh((3, 2), 1, 2), Mesh((5,), 3), Mesh((1, 3), 2), Mesh((2,), 1, 3), Mesh((1,), 3, 2),
    Mesh((2, 1, 3), 2),
]  # fmt: skip


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_groups_are_those_that_share_all_other_coordinates(mesh, monkeypatch):
    """In the order of global ranks; and all ranks make the groups that all make together in the same order."""
    world = mesh.runtime_ngpus
    pipeline, copies, first = range(3)  # coordinates: the pipeline rank, the copy, and the place on each axis
    coordinates = [mesh.coordinates(rank) for rank in range(world)]
    places = [(mesh.pipeline_rank(rank), copy, *place) for rank, (copy, place) in enumerate(coordinates)]
    made: dict[int, list[Any]] = {}
    layouts = list(product((Shard(0), REPLICATE, SHARED), repeat=len(mesh.sizes)))
    for mine in range(world):
        made[mine] = []

        def by_enumeration(groups: list[list[int]], mine: int = mine) -> tuple[Any, None]:
            made[mine].append(groups)
            assert sorted(rank for group in groups for rank in group) == list(range(world))
            (own,) = (group for group in groups if mine in group)
            return ("owners", *own), None

        def grid(kind: str, sizes: tuple[int, ...], mesh_dim_names: tuple[str, ...], mine: int = mine) -> Grid:
            assert kind == "cpu"
            return Grid(torch.arange(world).view(sizes), mesh_dim_names, mine)

        monkeypatch.setattr(module.dist, "is_initialized", lambda: True)
        monkeypatch.setattr(module.dist, "get_world_size", lambda: world)
        monkeypatch.setattr(module.dist, "get_rank", lambda mine=mine: mine)
        monkeypatch.setattr(module.dist, "new_subgroups_by_enumeration", by_enumeration)
        monkeypatch.setattr(module, "init_device_mesh", grid)
        axes = Axes(mesh, torch.device("cpu"))

        def alike(*free: int, mine: int = mine) -> list[int]:
            """The ranks with this rank's coordinates but for some."""
            fixed = [which for which in range(len(places[0])) if which not in free]
            return [rank for rank in range(world) if all(places[rank][at] == places[mine][at] for at in fixed)]

        for axis, ranks in (
            (axes.devices, alike(*(first + number for number in mesh.axes))), (axes.copies, alike(copies)),
            (axes.pipeline, alike(pipeline)),
            *((axes[number], alike(first + number)) for number in mesh.axes),
        ):  # fmt: skip
            assert (axis.size, axis.rank) == (len(ranks), ranks.index(mine))
            assert axis.group == (tuple(ranks) if len(ranks) > 1 else None)
        assert [getattr(axes, name) for name in mesh.names] == list(axes)
        assert (axes.replica, axes.place) == coordinates[mine]
        begun = len(made[mine])
        for layout in layouts:
            whole = [first + number for number, place in enumerate(layout) if not isinstance(place, Shard)]
            ranks = alike(copies, *whole)
            axis = axes.owners(layout)
            assert (axis.size, axis.rank) == (len(ranks), ranks.index(mine))
            assert axis.group == (("owners", *ranks) if len(ranks) > 1 else None)
        count = len(made[mine])
        assert count == len({str(groups) for groups in made[mine]}), "each once"
        assert mesh.pipeline == 1 or count == begun, "what other stages need is there from the beginning"
    assert all(groups == made[0] for groups in made.values())


def test_as_many_processes_run_as_the_plan_is_for():
    with pytest.raises(UserError, match=r"^the plan is for runtime_ngpus=6 processes; started are 1$"):
        Axes(Mesh((3,), 2), torch.device("cpu"))
