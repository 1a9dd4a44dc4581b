"""The order in which a block's units run in generated code: regions of pure computation, and what stands between them.

A *region* is a set of units that becomes one function, which `torch.compile` compiles on a GPU. No collective and no
registered operator runs between two units of a region. A *segment* is some regions that do not depend on each other,
followed by the registered operators and calls of blocks that use their results:

    segment 0   region: norm, q, k, v projections      then: attention
    segment 1   region: output projection, norm, MLP   then: nothing

Units are put into as few segments as the plan's resharding allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from nnscaler.graph import Block, Call, Node
from nnscaler.pieces import Stretch, stretches, with_registered
from nnscaler.placement import Placements
from nnscaler.plan import Plan
from nnscaler.units import Unit, divide, pure


@dataclass
class Region:
    """Units that run as one function.

    recomputed  whether the user named modules to recompute, and these units are of them: backward runs them again
    stretch     not None: the region is this stretch, computed in pieces
    around      not None: it is a part of this stretch, which holds a registered operator and is computed in pieces
    """

    units: list[Unit]
    recomputed: bool = False
    stretch: Stretch | None = None
    around: Stretch | None = None


@dataclass
class Segment:
    """Regions that do not depend on each other, then registered operators and calls of blocks, in order."""

    regions: list[Region] = field(default_factory=list)
    others: list[Unit] = field(default_factory=list)


def segments(plan: Plan, block: Block) -> list[Segment]:
    """The segments of a block, in the order in which they run."""
    units = divide(block)
    made_by = {name: index for index, unit in enumerate(units) for name in unit.outputs}
    named = plan.recomputed.get(block.name, set())
    possible = stretches(block) if plan.pieces else []
    divided, wide = (
        [one for one in found if (block.name, one.name) in plan.pieces]
        for found in (possible, with_registered(block, possible))
    )
    in_pieces = {units[index].name: stretch for stretch in divided for index in stretch.units}
    around = {units[index].name: stretch for stretch in wide for index in stretch.units}
    place: list[int] = []  # segment of each unit
    for unit in units:
        earliest = 0
        for name in unit.inputs:
            if name not in made_by:
                continue
            producer = made_by[name]
            is_pure, was_pure = pure(unit), pure(units[producer])
            apart = not was_pure or uses(plan, block, unit, name) != makes(plan, block, units[producer], name)
            apart |= (unit.name in named) != (units[producer].name in named)
            earliest = max(earliest, place[producer] + (is_pure and apart))
        place.append(earliest)
    for stretch in wide:  # what is computed for a registered operator alone, right before it
        for index in stretch.units:
            place[index] = place[stretch.units[-1]]
    found = [Segment() for _ in range(max(place, default=-1) + 1)]
    for unit, at in zip(units, place):
        segment = found[at]
        if not pure(unit):
            segment.others.append(unit)
            continue
        region = Region([unit], unit.name in named, in_pieces.get(unit.name), around.get(unit.name))
        same = [one for one in segment.regions if _alike(one, region)]
        if same:
            same[0].units.append(unit)
        else:
            segment.regions.append(region)
    return found


def _alike(one: Region, other: Region) -> bool:
    return one.recomputed == other.recomputed and one.stretch is other.stretch and one.around is other.around


def uses(plan: Plan, block: Block, unit: Unit, tensor: str) -> Placements:
    """The layout in which a unit uses one of its inputs."""
    node = next(node for node in unit.nodes if tensor in node.inputs)
    return _layouts(plan, block, node)[0][node.inputs.index(tensor)]


def makes(plan: Plan, block: Block, unit: Unit, tensor: str) -> Placements:
    """The layout in which a unit makes one of its outputs."""
    node = next(node for node in unit.nodes if tensor in node.outputs)
    return _layouts(plan, block, node)[1][node.outputs.index(tensor)]


def _layouts(plan: Plan, block: Block, node: Node) -> tuple[Sequence[Placements], Sequence[Placements]]:
    """The layouts of a node's inputs, and of its outputs. Those of a call are those of the block that it calls."""
    if isinstance(node, Call):
        return plan.inputs[node.block], plan.outputs[node.block]
    way = plan.nodes[block.name, node.name]
    return way.inputs, way.outputs
