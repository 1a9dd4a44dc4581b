"""What a user fixes of a plan before it is sought, by name or by a function of the graph.

A policy calls `Node.pin`, which says along which names an operator may be split, and `Graph.store`, which says how a
parameter is stored. The planner decides all that is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

from nnscaler.errors import UserError
from nnscaler.graph import Block, Call, Graph, Node
from nnscaler.operators import bind
from nnscaler.placement import Shard
from nnscaler.planner.options import Assignment, assignments
from nnscaler.units import Unit, divide

Policy: TypeAlias = Callable[[Graph], object]  # what it returns is not used


def apply_policy(graph: Graph, policy: str | Policy, devices: int) -> None:
    """Pins in a graph what a policy wants pinned, and nothing else.

    policy   a function of the graph, or one of
             autodist  the planner chooses everything
             dp        data parallel: what can be split along the samples of the batch is, and weights are whole
             tp        tensor parallel: each product with a weight is split along a dimension of the weight, and nothing
                       along the samples
    devices  that a copy of the model is split over

    Raises UserError where the policy pins what cannot be split, or the batch cannot be divided.
    """
    for block in graph.all_blocks():
        for node in block.nodes:
            node.pinned = None
    graph.stored = {}
    if callable(policy):
        policy(graph)
        _check(graph)
    elif policy == "dp" and devices > 1:
        _data_parallel(graph, devices)
    elif policy == "tp" and devices > 1:
        _tensor_parallel(graph, devices)


def _check(graph: Graph) -> None:
    """Raises UserError for what a policy pins and no number of devices could do."""
    for block in graph.all_blocks():
        for node in block.nodes:
            if node.pinned is None:
                continue
            what = f"the policy pins {node.op} '{node.name}' at {node.source or 'an unknown line'}"
            if isinstance(node, Call):
                raise UserError(f"{what}, which calls block {node.block}; pin the nodes of that")
            ways = [way.name for way in bind(node, block).splits(1)]
            wrong = next((name for name in node.pinned if name not in ways), None)
            if wrong is not None or not node.pinned:
                names = ", ".join(f"'{name}'" for name in ways[1:]) or "no name"
                pinned = f"'{wrong}'" if wrong else "nothing"
                raise UserError(f"{what} to {pinned}; it can be split along {names}, and None is no split")


def _data_parallel(graph: Graph, devices: int) -> None:
    """Pins each unit to the way in which most of its nodes are split along the samples, and no node that has samples is
    split otherwise."""
    count = _samples(graph)
    if count % devices:
        raise UserError(
            f"pas_policy is dp, which divides a micro-batch among plan_ngpus={devices} devices; the number of samples, "
            f"the first dimension of '{graph.root.inputs[0]}', is {count}; it must be a multiple of {devices}, or "
            "plan_ngpus 1, so that each copy of the model has samples of its own"
        )
    samples = _along_samples(graph)
    for block in graph.all_blocks():
        for unit, ways in ways_of(block):
            own = [samples.get((block.name, node.name)) for node in unit.nodes]
            ways = [way for way in ways if all(not name or split.name in (None, name) for split, name in zip(way, own))]
            most = max(ways, key=lambda way: sum(bool(name) and split.name == name for split, name in zip(way, own)))
            for node, split in zip(unit.nodes, most):
                node.pin(split.name)
    graph.stored = dict.fromkeys(graph.parameters, (None,))


def _tensor_parallel(graph: Graph, devices: int) -> None:
    """Pins products with weights to ways that shard a weight, where there are any, and nothing to samples."""
    samples = _along_samples(graph)
    for block in graph.all_blocks():
        weights = _weights(block)
        for unit, ways in ways_of(block):
            own = [samples.get((block.name, node.name)) for node in unit.nodes]
            ways = [way for way in ways if not any(name in split.names for name, split in zip(own, way))]
            if unit.kind != "cheap":
                places = [index for index, name in enumerate(unit.main.inputs) if name in weights]
                sizes = bind(unit.main, block).sizes
                ways = [
                    way
                    for way in ways
                    if any(isinstance(way[0].inputs[index], Shard) for index in places)
                    and all(sizes[name] % devices == 0 for name in way[0].names)
                ] or ways
            for index, node in enumerate(unit.nodes):
                node.pin(*dict.fromkeys(way[index].name for way in ways))


def ways_of(block: Block) -> Iterator[tuple[Unit, list[Assignment]]]:
    """The units of a block that are no calls, and all ways to split each on one axis."""
    for unit in divide(block):
        if unit.kind != "call":
            yield unit, list(assignments(unit, block, [bind(node, block) for node in unit.nodes]))


def _weights(block: Block) -> set[str]:
    """Names of matrices in a block that follow from its parameters alone."""
    found = set(block.parameters)
    for node in block.nodes:
        if node.inputs and found.issuperset(node.inputs):
            found.update(node.outputs)
    return {name for name in found if len(block.tensors[name].shape) > 1}


def _samples(graph: Graph) -> int:
    """How many samples a micro-batch has: the first dimension of the first input that has any."""
    shapes = [graph.root.tensors[name].shape for name in graph.root.inputs]
    return next((shape[0] for shape in shapes if shape), 1)


def _along_samples(graph: Graph) -> dict[tuple[str, str], str]:
    """(block, name of a node) -> the name of its annotation along which the samples lie, where it can be split so.

    They lie along the first dimension of every input of that size, and are followed from there.
    """
    shapes = {name: graph.root.tensors[name].shape for name in graph.root.inputs}
    found: dict[tuple[str, str], str] = {}
    dims_of: dict[str, dict[str, int]] = {}  # block -> tensor -> its dimension of samples

    def follow(block: Block, dims: dict[str, int]) -> dict[str, int]:
        if block.name in dims_of:
            return dims_of[block.name]
        dims_of[block.name] = dims
        for node in block.nodes:
            results: Iterable[tuple[str, int]]
            if isinstance(node, Call):
                inner = graph.blocks[node.block]
                given = {name: dims[outer] for name, outer in zip(inner.inputs, node.inputs) if outer in dims}
                made = follow(inner, given)
                results = [(outer, made[name]) for name, outer in zip(inner.outputs, node.outputs) if name in made]
            else:
                results = _split_along(node, block, dims, found)
            dims.update(results)
        return dims

    follow(graph.root, {name: 0 for name, shape in shapes.items() if shape and shape[0] == _samples(graph)})
    return found


def _split_along(
    node: Node, block: Block, dims: dict[str, int], found: dict[tuple[str, str], str]
) -> Iterable[tuple[str, int]]:
    """Notes in `found` along which name of a node the samples of its inputs lie, and gives the dimensions of samples of
    its results."""
    bound = bind(node, block)
    names: set[str] = set()
    for tensor, annotated in zip(node.inputs, bound.inputs):
        if tensor in dims and annotated is not None:
            names.update(annotated[dims[tensor]].names[:1])
    split = bound.split(names.pop()) if len(names) == 1 else None
    if split is None or split.name is None:
        return []
    found[block.name, node.name] = split.name
    return [(name, place.dim) for name, place in zip(node.outputs, split.outputs) if isinstance(place, Shard)]
