"""Groups of ranks: who is in them, and in which order."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from nnscaler.mesh import Mesh, PipelineMesh
from nnscaler.placement import REPLICATE, Shard
from nnscaler.runtime.axes import Axes
from tests.launch import run

WHOLE, SPLIT = REPLICATE, Shard(0)


def owners(mesh: Mesh, layouts: list[tuple]) -> list[tuple[int, int, list[int]]]:
    """(size, place, global ranks) of the owners of parameters in some layouts, each asked for twice."""
    axes, found = Axes(mesh, torch.device("cpu")), []
    for layout in layouts:
        axis = axes.owners(layout)
        assert axes.owners(layout) is axis or axis.group is None, "a group is made once"
        ranks = [dist.get_rank()] if axis.group is None else dist.get_process_group_ranks(axis.group)
        of_code = [one.group for one in (*axes, axes.devices, axes.copies, axes.pipeline) if one.group is not None]
        assert axis.group not in of_code, "what owners exchange does not queue with what forward exchanges"
        found.append((axis.size, axis.rank, ranks))
    return found


@pytest.mark.parametrize(
    ("mesh", "wanted"),
    [
        (Mesh((2,), 2), {(WHOLE,): lambda rank: range(4), (SPLIT,): lambda rank: (rank % 2, rank % 2 + 2)}),
        (
            Mesh((2, 2)),
            {
                (WHOLE, WHOLE): lambda rank: range(4),
                (SPLIT, WHOLE): lambda rank: (rank // 2 * 2, rank // 2 * 2 + 1),
                (WHOLE, SPLIT): lambda rank: (rank % 2, rank % 2 + 2),
                (SPLIT, SPLIT): lambda rank: (rank,),
            },
        ),
        (
            PipelineMesh.of([(2,)] * 2, 1),
            {(WHOLE,): lambda rank: (rank // 2 * 2, rank // 2 * 2 + 1), (SPLIT,): lambda rank: (rank,)},
        ),
    ],
    ids=["copies", "two axes", "pipeline"],
)
def test_owners_of_a_shard(mesh, wanted):
    for rank, found in enumerate(run(4, owners, mesh, list(wanted))):
        for (size, place, ranks), expected in zip(found, wanted.values(), strict=True):
            assert ranks == list(expected(rank))
            assert (size, place) == (len(ranks), ranks.index(rank))
