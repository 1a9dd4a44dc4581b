"""What parameters cost. The same parameter of all calls of a block is stored in the same way, and is one group."""

from __future__ import annotations

from dataclasses import dataclass

from nnscaler.placement import Placements
from nnscaler.plan import Key, Plan
from nnscaler.planner.costs import IN_FP8, STORED, CostModel, in_fp32


@dataclass(frozen=True)
class ParameterGroup:
    """The same parameter of all calls of a block.

    count           how many there are
    layout          how each of them is stored
    owners          how many ranks hold the same shard of it; they share its optimizer state
    exchanged_once  whether its gradient is exchanged once a step, rather than in each micro-batch
    elements        elements of one device's shard of one of them
    master_only     whether only the master weight is stored, in fp32; then that is what `memory` calls parameters
    trained         whether it is trained
    memory          category -> bytes of a device, for all of them
    update_seconds  seconds of a step on one device, for all of them
    """

    block: str
    tensor: str
    count: int
    layout: Placements
    owners: int
    exchanged_once: bool
    master_only: bool
    elements: int
    trained: bool
    memory: dict[str, float]
    update_seconds: float


def parameter_groups(plan: Plan, costs: CostModel) -> list[ParameterGroup]:
    """The groups of all parameters of a plan."""
    paths = {(block.name, tensor): path for block, tensor, path in plan.graph.parameter_uses()}
    blocks = {block.name: block for block in plan.graph.all_blocks()}
    groups = []
    for key, size in plan.memory.items():
        if key.category != "parameter" or key.detail != STORED:
            continue
        block, tensor = key.block, key.name
        path = paths[block, tensor]
        layout, once = plan.parameters[path], path in plan.exchanged_once
        meta = blocks[block].tensors[tensor]
        stored = in_fp32(meta) if path in plan.master_only else meta
        count = round(size / costs.local_bytes(stored, layout))
        update = plan.seconds.get(Key("update", block, tensor), 0.0) * plan.micro_batches
        narrow = plan.memory.get(Key("parameter", block, tensor, IN_FP8))
        exchange = count * costs.weight_exchange(meta, layout) if meta.requires_grad else 0.0
        groups.append(
            ParameterGroup(
                block=block,
                tensor=tensor,
                count=count,
                layout=layout,
                owners=costs.owners(layout),
                exchanged_once=once,
                master_only=path in plan.master_only,
                elements=costs.local_bytes(meta, layout) // meta.dtype.itemsize,
                trained=meta.requires_grad,
                memory={
                    what: count * one
                    for what, one in costs.parameter_memory(stored, layout, plan.micro_batches, once).items()
                }
                | ({IN_FP8: narrow} if narrow else {}),
                update_seconds=update - exchange,
            )
        )
    return groups
