"""Which ranks form which groups, on meshes whose axes are all of other sizes; without the other ranks."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from nnscaler.errors import UserError
from nnscaler.mesh import Mesh, PipelineMesh
from nnscaler.placement import REPLICATE, SHARED, Shard
from nnscaler.runtime import axes as module
from nnscaler.runtime.axes import Axes

MESHES = [
    PipelineMesh.of([(2, 3)] * 3, 2), PipelineMesh.of([(3, 2)] * 2, 1), Mesh((5,), 3), Mesh((1, 3), 2),
    PipelineMesh.of([(2,)] * 3, 1), PipelineMesh.of([(1,)] * 2, 3), Mesh((2, 1, 3), 2),
    PipelineMesh.of([(2,), (1,)], 2), PipelineMesh.of([(1,), (4,), (2, 2)], 3),
]  # fmt: skip


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_groups_are_those_that_share_all_other_coordinates(mesh, monkeypatch):
    """In the order of global ranks; and all ranks make the groups that all make together in the same order."""
    world = mesh.runtime_ngpus
    pipeline, copies, first = range(3)  # coordinates: the pipeline rank, the copy, and the place on each axis
    ranks_of = mesh.ranks if isinstance(mesh, PipelineMesh) else (mesh,)
    places: list[tuple[int, ...]] = []
    for number, one in enumerate(ranks_of):
        places += [(number, *place) for place in product(range(one.replicas), *map(range, one.sizes))]
    made: dict[int, list[Any]] = {}
    for mine in range(world):
        made[mine] = []

        def by_enumeration(groups: list[list[int]], mine: int = mine) -> tuple[Any, None]:
            made[mine].append(groups)
            every = sorted(rank for group in groups for rank in group)
            assert every == list(range(every[0], every[0] + len(every))), "of one pipeline rank"
            return next(((len(made[mine]), *group) for group in groups if mine in group), None), None

        def new_group(ranks: list[int], mine: int = mine) -> Any:
            made[mine].append(ranks)
            return tuple(ranks)

        monkeypatch.setattr(module.dist, "is_initialized", lambda: True)
        monkeypatch.setattr(module.dist, "get_world_size", lambda: world)
        monkeypatch.setattr(module.dist, "get_rank", lambda mine=mine: mine)
        monkeypatch.setattr(module.dist, "new_subgroups_by_enumeration", by_enumeration)
        monkeypatch.setattr(module.dist, "new_group", new_group)
        axes = Axes(mesh, torch.device("cpu"))
        own = ranks_of[places[mine][pipeline]]
        assert axes.mesh is own
        assert axes.whole is mesh

        def alike(*free: int, mine: int = mine) -> list[int]:
            """The ranks with this rank's coordinates but for some."""
            fixed = [which for which in range(len(places[mine])) if which not in free]
            same = [rank for rank in range(world) if len(places[rank]) == len(places[mine])]
            return [rank for rank in same if all(places[rank][at] == places[mine][at] for at in fixed)]

        for axis, ranks in (
            (axes.devices, alike(*(first + number for number in own.axes))), (axes.copies, alike(copies)),
            *((axes[number], alike(first + number)) for number in own.axes),
        ):  # fmt: skip
            assert (axis.size, axis.rank) == (len(ranks), ranks.index(mine))
            assert (axis.group and axis.group[1:]) == (tuple(ranks) if len(ranks) > 1 else None)
        assert [getattr(axes, name) for name in own.names] == list(axes)
        assert (axes.replica, axes.place) == (places[mine][copies], places[mine][first:])
        assert (axes.pipeline.size, axes.pipeline.rank) == (len(ranks_of), places[mine][pipeline])
        _check_crossing(axes, mesh, alike(pipeline))
        begun, of_code = len(made[mine]), {axes.devices.group, axes.copies.group, *(axis.group for axis in axes)}
        for layout in product((Shard(0), REPLICATE, SHARED), repeat=len(own.sizes)):
            whole = [first + number for number, place in enumerate(layout) if not isinstance(place, Shard)]
            ranks = alike(copies, *whole)
            axis = axes.owners(layout)
            assert (axis.size, axis.rank) == (len(ranks), ranks.index(mine))
            assert (axis.group and axis.group[1:]) == (tuple(ranks) if len(ranks) > 1 else None)
            assert axis.group is None or axis.group not in of_code
        assert len(ranks_of) == 1 or len(made[mine]) == begun, "what other stages need is there from the beginning"
    assert all(groups == made[0] for groups in made.values())


def _check_crossing(axes: Axes, mesh: Mesh | PipelineMesh, lane: list[int]) -> None:
    """Where ranks are even, their devices of the same place talk with each other; else all of a copy."""
    if isinstance(mesh, Mesh):
        assert (axes.pipeline.group, axes.crossing) == (None, None)
    elif mesh.is_even:
        assert axes.pipeline.group == axes.crossing == tuple(lane)
    else:
        assert axes.crossing == tuple(rank for one in mesh.ranks for rank in one.of_copy(axes.replica))
        own = axes.pipeline.group
        assert own is not None
        assert [mesh.rank_of(rank) for rank in own] == list(range(len(mesh.ranks)))
        assert set(own) <= set(axes.crossing)
        assert own[axes.pipeline.rank] == axes.rank


def test_as_many_processes_run_as_the_plan_is_for():
    with pytest.raises(UserError, match=r"^the plan is for runtime_ngpus=6 processes; started are 1$"):
        Axes(Mesh((3,), 2), torch.device("cpu"))
