"""Cutting a graph into the graphs of pipeline stages: stages begin where blocks of certain classes are called.

A tensor that is made in one stage and used in a later one *crosses*. It is an output of its stage, and both an input
and an output of every stage on the way, because a stage only talks to its neighbours. The model's own inputs are given
to every stage. What follows from them and from buffers alone, and needs no gradient (positions, masks), is computed
anew in each stage that uses it. A parameter that several stages use is a parameter of each of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from nnscaler.errors import UserError
from nnscaler.graph import Block, Call, Graph, Node


@dataclass(frozen=True)
class StageGraph:
    """What one stage computes.

    graph     its inputs are those in `received`, then those of the model's own inputs that it uses; its outputs are
              those in `sent`, or the model's own outputs in the last stage
    received  names of the tensors that come from the stage before
    sent      names of the tensors that go to the stage after
    """

    graph: Graph
    received: tuple[str, ...]
    sent: tuple[str, ...]


def pivots(graph: Graph, classes: Sequence[str] = ()) -> list[int]:
    """Indices of the root block's nodes at which a stage may begin.

    classes  names of module classes; empty: the class of the block that is called most often

    Raises UserError for a class whose modules the graph does not call as blocks.
    """
    calls = [(index, node) for index, node in enumerate(graph.root.nodes) if isinstance(node, Call)]
    kinds = {block.name: block.module_type for block in graph.blocks.values()}
    known = sorted(set(kinds.values()))
    if not known:
        raise UserError("explore_pipeline needs a model with repeated modules, at which stages can begin; it has none")
    for name in classes:
        if name not in known:
            raise UserError(f"pipeline_pivots has '{name}'; the model's repeated modules are {', '.join(known)}")
    chosen = set(classes) or {kinds[max(graph.blocks, key=lambda block: len(graph.calls(block)))]}
    return [index for index, call in calls if kinds[call.block] in chosen]


def cut(graph: Graph, begins: Sequence[int]) -> list[StageGraph]:
    """The stages that begin at the first node and at each index in `begins`; these must rise."""
    root = graph.root
    assert all(a < b for a, b in pairwise([0, *begins, len(root.nodes)])), begins
    copied = _copied(graph)
    bounds = [0, *begins, len(root.nodes)]
    segments = [[node for node in root.nodes[first:last] if node not in copied] for first, last in pairwise(bounds)]
    stages: list[StageGraph] = []
    received: tuple[str, ...] = ()
    for index, nodes in enumerate(segments):
        later = {name for segment in segments[index + 1 :] for node in segment for name in node.inputs}
        made = [*received, *(name for node in nodes for name in node.outputs)]
        if index + 1 < len(segments):
            sent = tuple(name for name in made if name in later.union(root.outputs))
            outputs = sent
        else:
            sent, outputs = (), tuple(root.outputs)
        stages.append(StageGraph(_stage(graph, nodes, copied, received, outputs), received, sent))
        received = sent
    return stages


def shared_parameters(stages: Sequence[Graph], trained: bool = True) -> dict[str, list[int]]:
    """Parameters that several stages use -> the indices of those stages. `trained`: those that are trained alone"""
    found: dict[str, list[int]] = {}
    for index, graph in enumerate(stages):
        for name, meta in graph.parameters.items():
            if meta.requires_grad or (not trained and name not in graph.buffers):
                found.setdefault(name, []).append(index)
    return {name: users for name, users in found.items() if len(users) > 1}


def _copied(graph: Graph) -> list[Node]:
    """Nodes that need no gradient, and follow from the model's inputs and buffers alone: each stage has its own."""
    root = graph.root
    known = {*root.inputs, *(name for name in root.parameters if not root.tensors[name].requires_grad)}
    found = []
    for node in root.nodes:
        plain = not isinstance(node, Call) and not any(root.tensors[name].requires_grad for name in node.outputs)
        if plain and known.issuperset(node.inputs):
            known.update(node.outputs)
            found.append(node)
    return found


def _stage(
    graph: Graph, nodes: list[Node], copied: list[Node], received: tuple[str, ...], outputs: tuple[str, ...]
) -> Graph:
    root = graph.root
    needed = {name for node in nodes for name in node.inputs}.union(outputs)
    before = []
    for node in reversed(copied):
        if needed.intersection(node.outputs):
            needed.update(node.inputs)
            before.append(node)
    nodes = [*reversed(before), *nodes]
    block = Block(root.name, root.module_type)
    block.inputs = [*received, *(name for name in root.inputs if name in needed)]
    block.parameters = {name: path for name, path in root.parameters.items() if name in needed}
    block.nodes, block.outputs = nodes, list(outputs)
    names: Iterable[str] = (*block.inputs, *block.parameters, *(name for node in nodes for name in node.outputs))
    block.tensors = {name: root.tensors[name] for name in names}
    calls = {node.block for node in nodes if isinstance(node, Call)}
    stage = Graph(block, {name: body for name, body in graph.blocks.items() if name in calls}, {}, {})
    used = {path for _, _, path in stage.parameter_uses()}
    stage.parameters = {path: meta for path, meta in graph.parameters.items() if path in used}
    stage.buffers = {path: tensor for path, tensor in graph.buffers.items() if path in used}
    stage.stored = {path: dims for path, dims in graph.stored.items() if path in used}
    stage.tied = {name: path for name, path in graph.tied.items() if path in used}
    return stage
