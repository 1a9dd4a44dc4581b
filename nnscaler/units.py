"""Units: the parts of a block that the planner decides about.

A unit is one *product* (an operator with considerable arithmetic); or one *registered* operator; or a cluster of
*cheap* operators that run as one fused kernel, and so in one layout; or a *call* of another block. Views belong to the
unit whose result they look at. Example: the MLP of a Llama layer has three products and, between them, a cluster of
`silu` and `*`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from nnscaler.graph import Block, Call, Node
from nnscaler.operators import operator_of
from nnscaler.operators.registry import bind, no_flops


@dataclass
class Unit:
    """Nodes that are decided about as one.

    kind     "product", "registered", "cheap" or "call"
    nodes    in the order in which they run
    depth    how many products and registered operators lie on the longest way to it from the block's inputs
    inputs   names of the tensors that come from outside, in the order of first use
    outputs  names of the tensors that others use
    rounds   whether it may be a product in fp8, whose backward reads a rounded copy of its input instead
    """

    kind: str
    nodes: list[Node]
    depth: int = 0
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    rounds: bool = False

    @property
    def name(self) -> str:
        """The name of its last result."""
        return self.nodes[-1].name

    @property
    def main(self) -> Node:
        """The node that costs most: the first, which in a product or registered operator is that operator."""
        return self.nodes[0]


def node_kind(node: Node) -> str:
    """The kind of unit that a node makes: see `Unit`."""
    if isinstance(node, Call):
        return "call"
    operator = operator_of(node)
    if operator.function is not None:
        return "registered"
    return "cheap" if operator.flops is no_flops else "product"


def divide(block: Block) -> list[Unit]:
    """The units of a block, in an order in which they can run."""
    made_by = {name: node for node in block.nodes for name in node.outputs}
    depths = _depths(block, made_by)
    cluster = _clusters(block, made_by, depths)
    units = []
    for nodes in cluster:
        unit = Unit(node_kind(nodes[0]), nodes, depths[nodes[0].name])
        inside = {name for node in nodes for name in node.outputs}
        unit.inputs = list(dict.fromkeys(name for node in nodes for name in node.inputs if name not in inside))
        units.append(unit)
    outside = {name for unit in units for name in unit.inputs}.union(block.outputs)
    for unit in units:
        unit.outputs = [name for node in unit.nodes for name in node.outputs if name in outside]
    return _in_order(units)


def pure(unit: Unit) -> bool:
    """Whether a unit is computation alone, so that it can be compiled together with others."""
    return unit.kind in ("product", "cheap")


def regions_of(units: list[Unit]) -> list[int]:
    """For each unit, the largest number of registered operators and calls on a way to it. Pure ones with the same
    number are computed together, unless what one makes is resharded for another."""
    made_by = {name: index for index, unit in enumerate(units) for name in unit.outputs}
    regions: list[int] = []
    for unit in units:
        producers = [made_by[name] for name in unit.inputs if name in made_by]
        regions.append(max((regions[index] + (not pure(units[index])) for index in producers), default=0))
    return regions


def is_elementwise(unit: Unit, block: Block) -> bool:
    """Whether each element that a unit makes depends on no others of a tensor than the one at its own place."""
    for node in unit.nodes:
        bound = bind(node, block)
        taken, made = ({name for tensor in side for dim in tensor or () for name in dim.names}
                       for side in (bound.inputs, bound.outputs))  # fmt: skip
        if taken - made or taken & bound.frozen:
            return False
    return True


def saved_by(node: Node, block: Block) -> list[str]:
    """Names of the tensors that a node's backward reads."""
    inputs, outputs = ([block.tensors[name] for name in names] for names in (node.inputs, node.outputs))
    if isinstance(node, Call) or not any(meta.requires_grad for meta in outputs):
        return []
    return operator_of(node).saves(node, inputs, outputs)


def needed_by(unit: Unit, block: Block) -> list[str]:
    """The unit's inputs and outputs that its backward reads, or from which it makes inner tensors again."""
    made_by = {name: node for node in unit.nodes for name in node.outputs}
    needed: dict[str, None] = {}

    seen: set[str] = set()

    def want(name: str) -> None:
        waiting = [name]
        while waiting:
            name = waiting.pop()
            if name in seen:
                continue
            seen.add(name)
            if name not in made_by or name in unit.outputs:
                needed[name] = None
            elif unit.kind == "cheap":
                waiting += reversed(made_by[name].inputs)
            else:
                needed.update(dict.fromkeys(unit.outputs))  # the outputs are views of what is saved

    for node in unit.nodes:
        for name in saved_by(node, block):
            want(name)
    return list(needed)


def _depths(block: Block, made_by: dict[str, Node]) -> dict[str, int]:
    """Name of a node -> how many units that are not cheap lie on the longest way to it, itself included."""
    depths: dict[str, int] = {}
    for node in block.nodes:
        before = max((depths[made_by[name].name] for name in node.inputs if name in made_by), default=0)
        depths[node.name] = before + (node_kind(node) != "cheap")
    return depths


def _clusters(block: Block, made_by: dict[str, Node], depths: dict[str, int]) -> list[list[Node]]:
    """The nodes of each unit: cheap neighbours of equal depth, and views with what they look at.

    Equal depth keeps a product from lying between two parts of a cluster.
    """
    leader = {node.name: node.name for node in block.nodes}

    def find(name: str) -> str:
        while leader[name] != name:
            name = leader[name]
        return name

    def neighbours() -> Iterator[tuple[Node, Node]]:
        for node in block.nodes:
            for name in node.inputs:
                if name in made_by:
                    yield made_by[name], node

    for producer, node in neighbours():
        if node_kind(producer) == node_kind(node) == "cheap" and depths[producer.name] == depths[node.name]:
            leader[find(node.name)] = find(producer.name)
    groups: dict[str, list[Node]] = {}
    for node in block.nodes:
        groups.setdefault(find(node.name), []).append(node)
    for key, nodes in list(groups.items()):
        producers = {find(made_by[name].name) for node in nodes for name in node.inputs if name in made_by} - {key}
        if len(producers) == 1 and all(_is_view(node) for node in nodes):
            (host,) = producers
            if node_kind(groups[host][0]) in ("product", "registered"):
                groups[host].extend(groups.pop(key))
    return list(groups.values())


def _is_view(node: Node) -> bool:
    return node_kind(node) == "cheap" and operator_of(node).alias


def _in_order(units: list[Unit]) -> list[Unit]:
    """The units in an order in which each comes after those whose results it uses; else as their nodes stand in the
    block."""
    made_by = {name: unit for unit in units for name in unit.outputs}
    done: list[Unit] = []

    def visit(unit: Unit) -> None:
        if unit in done:
            return
        for name in unit.inputs:
            if name in made_by:
                visit(made_by[name])
        done.append(unit)

    for unit in units:
        visit(unit)
    return done
