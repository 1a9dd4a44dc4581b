"""The order in which a block's units run: regions of pure computation, and between them what must not be compiled.

A region is a set of units without a collective or a registered operator between any two of them, so that it can be one
compiled function. Units are put into as few regions as the plan's resharding allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from nnscaler.graph import Block, Call, Node
from nnscaler.pieces import Run, runs
from nnscaler.placement import Placements
from nnscaler.plan import Plan
from nnscaler.units import Unit, divide, pure


@dataclass
class Region:
    """Units that run as one function.

    again   backward computes them again, as the user wants it
    run     they are computed in pieces, as this run
    """

    units: list[Unit]
    again: bool = False
    run: Run | None = None


@dataclass
class Step:
    """A number of regions that do not depend on each other, then registered operators and calls in order."""

    regions: list[Region] = field(default_factory=list)
    others: list[Unit] = field(default_factory=list)


def schedule(plan: Plan, block: Block) -> list[Step]:
    """The steps of a block."""
    units = divide(block)
    made_by = {name: index for index, unit in enumerate(units) for name in unit.outputs}
    again = plan.recomputed.get(block.name, set())
    divided = [run for run in runs(block) if (block.name, run.name) in plan.pieces] if plan.pieces else []
    in_pieces = {units[index].name: run for run in divided for index in run.units}
    place: list[int] = []  # step of each unit
    for unit in units:
        earliest = 0
        for name in unit.inputs:
            if name not in made_by:
                continue
            producer = made_by[name]
            is_pure, was_pure = pure(unit), pure(units[producer])
            apart = not was_pure or uses(plan, block, unit, name) != makes(plan, block, units[producer], name)
            apart |= (unit.name in again) != (units[producer].name in again)
            earliest = max(earliest, place[producer] + (is_pure and apart))
        place.append(earliest)
    steps = [Step() for _ in range(max(place, default=-1) + 1)]
    for unit, at in zip(units, place):
        step = steps[at]
        if not pure(unit):
            step.others.append(unit)
            continue
        is_again, run = unit.name in again, in_pieces.get(unit.name)
        same = [region for region in step.regions if region.again == is_again and region.run is run]
        if same:
            same[0].units.append(unit)
        else:
            step.regions.append(Region([unit], is_again, run))
    return steps


def uses(plan: Plan, block: Block, unit: Unit, tensor: str) -> Placements:
    """The layout in which a unit uses a tensor."""
    node = next(node for node in unit.nodes if tensor in node.inputs)
    return _layouts(plan, block, node)[0][node.inputs.index(tensor)]


def makes(plan: Plan, block: Block, unit: Unit, tensor: str) -> Placements:
    """The layout in which a unit makes a tensor."""
    node = next(node for node in unit.nodes if tensor in node.outputs)
    return _layouts(plan, block, node)[1][node.outputs.index(tensor)]


def _layouts(plan: Plan, block: Block, node: Node) -> tuple[Sequence[Placements], Sequence[Placements]]:
    """Those of a node's inputs and outputs; a call's are those of its block."""
    if isinstance(node, Call):
        return plan.inputs[node.block], plan.outputs[node.block]
    way = plan.nodes[block.name, node.name]
    return way.inputs, way.outputs
