"""What the operators, tensors and levels of each block cost, in the order in which they run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nnscaler.graph import Block, Call, Node
from nnscaler.placement import format_placements, local_shape
from nnscaler.plan import Key, Plan
from nnscaler.planner.options import is_alias
from nnscaler.report.categories import category_of, costs_of
from nnscaler.report.parameters import ParameterGroup
from nnscaler.units import Unit, divide


def block_costs(plan: Plan, block: Block, parameters: list[ParameterGroup]) -> dict[str, Any]:
    """The costs of one block, as plain values. Seconds and bytes are those of a device, for all calls; seconds, of a
    step.

    calls              how often the block runs in a micro-batch
    levels             recompute level -> calls that have it, seconds of what they compute again, bytes that they keep
    given_saved_bytes  tensor -> bytes that backward keeps of what the block does not compute itself: its inputs,
                       gathered parameters, results of calls
    units              the units in order; `calls_block` stands where another block is called
    parameters         the block's parameters, see `ParameterGroup`
    """
    saved: dict[str, float] = {}
    for key, size in plan.memory.items():
        if key.category in ("saved", "inside") and key.block == block.name:
            saved[key.name] = saved.get(key.name, 0.0) + size
    made = {name for unit in divide(block) if unit.kind != "call" for name in _made(unit)}
    rows: list[dict[str, Any]] = []
    for unit in divide(block):
        if unit.kind == "call":
            assert isinstance(unit.main, Call)
            if all(row.get("calls_block") != unit.main.block for row in rows):
                rows.append({"calls_block": unit.main.block})
        elif not is_alias(unit) or _made(unit) & set(saved):
            rows.append(_unit(plan, block, unit, saved))
    return {
        "calls": plan.graph.count(block),
        "levels": _levels(plan, block),
        "given_saved_bytes": {name: size for name, size in saved.items() if name not in made},
        "units": rows,
        "parameters": [_parameter(group) for group in parameters if group.block == block.name],
    }


def _unit(plan: Plan, block: Block, unit: Unit, saved: dict[str, float]) -> dict[str, Any]:
    ways = [plan.nodes[block.name, node.name] for node in unit.nodes]
    layouts: dict[str, str] = {}
    for node, way in zip(unit.nodes, ways):
        layouts.update(zip(node.inputs, map(format_placements, way.inputs)))
        layouts.update(zip(node.outputs, map(format_placements, way.outputs)))
    again = {
        key.detail: value * plan.micro_batches
        for key, value in plan.seconds.items()
        if key[:3] == ("again", block.name, unit.name)
    }
    return {
        "name": unit.name if unit.kind == "cheap" else unit.main.name,
        "category": category_of(unit),
        "operators": [node.op for node in unit.nodes],
        "module": unit.main.module,
        "source": unit.main.source,
        "splits": list(dict.fromkeys(way.split for way in ways)),
        "inputs": {name: layouts[name] for name in unit.inputs},
        "outputs": {name: layouts[name] for name in unit.outputs},
        "seconds": {
            "forward": plan.seconds.get(Key("forward", block.name, unit.name), 0.0) * plan.micro_batches,
            "backward": plan.seconds.get(Key("backward", block.name, unit.name), 0.0) * plan.micro_batches,
            "again": sum(again.values()),
        },
        "saved_bytes": sum(size for name, size in saved.items() if name in _made(unit)),
        "origin": _origin(plan, block, unit.main),
    }


def _origin(plan: Plan, block: Block, node: Node) -> str:
    way = plan.nodes[block.name, node.name]
    metas = [block.tensors[name] for name in node.inputs]
    inputs = [
        replace(meta, shape=local_shape(meta.shape, layout, plan.mesh.sizes)) for meta, layout in zip(metas, way.inputs)
    ]
    return "roofline" if way.in_fp8 else costs_of(plan).node_origin(node, inputs)


def _made(unit: Unit) -> set[str]:
    return {unit.name, *(name for node in unit.nodes for name in node.outputs)}


def _levels(plan: Plan, block: Block) -> dict[str, dict[str, float]]:
    """Recompute level -> calls that have it, seconds of a step that they compute again, bytes that they keep."""
    found: dict[str, dict[str, float]] = {}
    for level, calls in plan.levels[block.name].items():
        found[level.name] = {
            "calls": calls,
            "again_seconds": plan.micro_batches * _sum(plan.seconds, ("again",), block.name, level.name),
            "saved_bytes": _sum({**plan.memory, **plan.host}, ("saved", "inside"), block.name, level.name),
        }
    return found


def _sum(values: dict[Key, float], categories: tuple[str, ...], block: str, level: str) -> float:
    return sum(
        value
        for key, value in values.items()
        if key.category in categories and (key.block, key.detail) == (block, level)
    )


def _parameter(group: ParameterGroup) -> dict[str, Any]:
    return {
        "tensor": group.tensor,
        "count": group.count,
        "layout": format_placements(group.layout),
        "owners": group.owners,
        "exchanged_once": group.exchanged_once,
        "master_only": group.master_only,
        "trained": group.trained,
        "bytes": group.memory,
        "update_seconds": group.update_seconds,
    }
