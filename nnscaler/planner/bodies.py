"""What is found out about a block once, for all problems on a mesh: stages of a pipeline have blocks in common."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

from nnscaler.graph import Block
from nnscaler.mesh import Mesh
from nnscaler.planner.costs import CostModel
from nnscaler.planner.options import Option, unit_options
from nnscaler.recompute import Level
from nnscaler.recompute.keeping import Keeping
from nnscaler.units import Unit, divide


@dataclass
class Body:
    """The units of a block, the options of those that are no calls, and what levels keep."""

    block: Block
    fused: bool
    units: list[Unit]
    options: dict[int, tuple[Option, ...]]
    kept: dict[Level, Keeping] = field(default_factory=dict)

    def keeps(self, level: Level) -> Keeping:
        if level not in self.kept:
            self.kept[level] = level.keeps(self.units, self.block, self.fused)
        return self.kept[level]


Bodies: TypeAlias = dict[tuple[int, Mesh], Body]  # by the block's identity; a body keeps its block, so it stays its own


def body_of(block: Block, costs: CostModel, known: Bodies) -> Body:
    """What is known of a block, or is found out. `known`: with cost models that differ in their mesh alone"""
    key = (id(block), costs.mesh)
    if key not in known:
        units = divide(block)
        options = {
            index: tuple(unit_options(unit, block, costs)) for index, unit in enumerate(units) if unit.kind != "call"
        }
        for index, some in options.items():
            units[index].rounds = any(option.rounded for option in some)
        known[key] = Body(block, costs.fused, units, options)
    return known[key]
