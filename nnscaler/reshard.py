"""How a tensor gets from the layout in which it is made to the layout in which it is used.

A change of layout is a list of `Reshard`s, each along one mesh axis. The planner prices them and the code generator
writes them, so that what is priced is what runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from nnscaler.placement import PARTIAL, REPLICATE, SHARED, Placement, Placements, Replicate, Shard

# (placement before, placement after) -> what runs in forward, what runs in backward
_COLLECTIVES = {
    ("P", "R"): ("all_reduce", "identity"),
    ("P", "R*"): ("all_reduce", "all_reduce"),
    ("P", "S"): ("reduce_scatter", "all_gather"),
    ("R", "R*"): ("identity", "all_reduce"),
    ("R", "S"): ("slice", "all_gather"),
    ("R*", "R"): ("identity", "divide"),
    ("R*", "S"): ("slice", "pad"),
    ("S", "R"): ("all_gather", "slice"),
    ("S", "R*"): ("all_gather", "reduce_scatter"),
    ("S", "S"): ("all_to_all", "all_to_all"),
}


@dataclass(frozen=True)
class Reshard:
    """A change of a tensor's placement along one mesh axis, from `source` to `target`.

    `axis` is an index into `Mesh.sizes`.
    """

    axis: int
    source: Placement
    target: Placement

    @property
    def collectives(self) -> tuple[str, str]:
        """Names of what runs in forward and in backward, such as ("all_gather", "reduce_scatter").

        Not all of them communicate: "identity", "slice", "pad" and "divide" are local.
        """
        return _COLLECTIVES[_kind(self.source), _kind(self.target)]


def _kind(placement: Placement) -> str:
    return "S" if isinstance(placement, Shard) else str(placement)


@cache
def reshards(source: Placements, target: Placements) -> tuple[Reshard, ...] | None:
    """The changes that turn layout `source` into layout `target`, in the order in which they run.

    None where it cannot be done: `target` is a partial sum on an axis where `source` is not.

    Example: on a mesh of one axis, `reshards((Shard(1),), (REPLICATE,))` is one all-gather.

    A dimension that is sharded on several axes is nested, with the earlier axis outermost. Before its outer axis
    changes, the inner ones are gathered, and they are sharded again afterwards.
    """
    current = list(source)
    found: list[Reshard] = []

    def change(axis: int, placement: Placement) -> None:
        found.append(Reshard(axis, current[axis], placement))
        current[axis] = placement

    for axis, wanted in enumerate(target):
        if current[axis] == wanted:
            continue
        if wanted == PARTIAL:
            return None
        dims = {placement.dim for placement in (current[axis], wanted) if isinstance(placement, Shard)}
        for inner in reversed(range(axis + 1, len(target))):
            placement, goal = current[inner], target[inner]
            if isinstance(placement, Shard) and placement.dim in dims:
                change(inner, goal if isinstance(goal, Replicate) else REPLICATE)
        change(axis, wanted)
    return tuple(found)


def only_gathers(changes: Sequence[Reshard] | None, with_gradient: bool) -> bool:
    """Whether all changes are all-gathers, whose gradients, if there are any, are reduce-scattered.

    A weight that is stored in shards is brought to its user in this way, and so beside computation.
    """
    if not changes:
        return False
    gathers = [("all_gather", "reduce_scatter"), *([] if with_gradient else [("all_gather", "slice")])]
    return all(one.collectives in gathers for one in changes)


@cache
def without_gradient(placements: Placements) -> Placements:
    """The same layout for a tensor that has no gradient: whether a gradient is partial (R*) does not matter then."""
    return tuple(REPLICATE if placement == SHARED else placement for placement in placements)
