"""Of what each piece is made, of a stretch that generated code computes in pieces (see `nnscaler.pieces`)."""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm

from nnscaler.codegen.segments import makes, uses
from nnscaler.graph import Block
from nnscaler.pieces import Stretch
from nnscaler.placement import PARTIAL, Placements, shards
from nnscaler.plan import Plan
from nnscaler.units import Unit, pure


@dataclass(frozen=True)
class Divided:
    """How the tensors of a stretch are divided into pieces.

    blocks  of how many blocks of a whole tensor a piece has a part each. Every device has some of these blocks whole.
            None: of what a device has, a piece has one part
    """

    plan: Plan
    block: Block
    stretch: Stretch
    blocks: int | None

    def along(self, tensor: str, layout: Placements) -> int | tuple[int, int] | None:
        """The dimension along which a tensor that lies so is divided; or that, and the number of blocks of which each
        piece has a part. None: it is not divided."""
        if tensor not in self.stretch.dims:
            return None
        dim, count = self.stretch.dims[tensor], self.plan.pieces[self.block.name, self.stretch.name]
        parts = shards(layout, dim, self.plan.mesh.sizes)
        blocks = parts if self.blocks is None else self.blocks
        fits = blocks % parts == 0 and self.block.tensors[tensor].shape[dim] % (blocks * count) == 0
        assert fits, f"{tensor} cannot be divided into the {count} pieces of {self.stretch.name}"
        return dim if blocks == parts else (dim, blocks // parts)


def divided(plan: Plan, block: Block, stretch: Stretch, units: list[Unit]) -> Divided:
    """How a plan divides the tensors of units of a stretch that run as one function, a piece at a time. The plan must
    allow it: of what these make, only what the registered operator uses is resharded, and is no partial sum."""
    made_by = {name: unit for unit in units for name in unit.outputs}
    found: list[int] = []
    for unit, tensor in [(user, name) for user in units for name in user.inputs if name in made_by]:
        made, used = makes(plan, block, made_by[tensor], tensor), uses(plan, block, unit, tensor)
        if made == used:
            continue
        assert not pure(unit), f"{tensor} is resharded inside the pieces of {stretch.name}"
        assert PARTIAL not in made, f"{tensor} is a partial sum inside the pieces of {stretch.name}"
        if tensor in stretch.dims:
            before, after = (shards(layout, stretch.dims[tensor], plan.mesh.sizes) for layout in (made, used))
            found += [lcm(before, after)] if before != after else []
    parts = Divided(plan, block, stretch, lcm(*found) if found else None)
    for node in (node for unit in units for node in unit.nodes):
        way = plan.nodes[block.name, node.name]
        for tensor, layout in zip((*node.inputs, *node.outputs), (*way.inputs, *way.outputs)):
            parts.along(tensor, layout)
    return parts
