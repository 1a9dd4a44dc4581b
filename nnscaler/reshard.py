"""From how a tensor lies to how its user needs it: the collectives in between, forward and backward.

The planner prices these steps and the code generator writes them, so that what is priced is what runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nnscaler.placement import PARTIAL, REPLICATE, SHARED, Placement, Placements, Replicate, Shard

# (from, to) -> forward collective, backward collective. `move` is another dimension of the same tensor.
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
class Step:
    """One collective along mesh axis `axis`; `source` and `target` are the tensor's placements there."""

    axis: int
    source: Placement
    target: Placement

    @property
    def collectives(self) -> tuple[str, str]:
        """Names of what runs forward and backward."""
        return _COLLECTIVES[_kind(self.source), _kind(self.target)]


def _kind(placement: Placement) -> str:
    return "S" if isinstance(placement, Shard) else str(placement)


def reshard_steps(source: Placements, target: Placements) -> list[Step] | None:
    """The steps that turn `source` into `target`, in order; None where `target` has a partial sum that `source` lacks.

    A dimension sharded on several axes is nested, the earlier axis outermost: before an outer axis of it changes, the
    inner ones are gathered, and sharded again afterwards.
    """
    current = list(source)
    steps: list[Step] = []

    def change(axis: int, placement: Placement) -> None:
        steps.append(Step(axis, current[axis], placement))
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
    return steps


def brings_together(steps: Sequence[Step] | None) -> bool:
    """Whether steps make a whole of shards whose gradients are sums: what is done with weights beside computation."""
    return bool(steps) and all(step.collectives == ("all_gather", "reduce_scatter") for step in steps or ())


def without_gradient(placements: Placements) -> Placements:
    """The same placements for a tensor that has no gradient."""
    return tuple(REPLICATE if placement == SHARED else placement for placement in placements)
