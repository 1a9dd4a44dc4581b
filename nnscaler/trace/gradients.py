"""Which tensors of a graph need a gradient. Where calls of a block differ in this, the block becomes several."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from nnscaler.graph import Block, Call, Graph, Node

# Their results have no gradient, whatever their inputs have.
_MADE = ("zeros", "ones", "empty", "full")
_STOP = {f"aten.{name}.default" for name in ("detach", *(f"{x}_like" for x in _MADE), *(f"new_{x}" for x in _MADE))}


def mark_gradients(graph: Graph) -> None:
    """Sets `requires_grad` of every tensor, as follows from the parameters.

    The calls of a block may differ in which parameters are trained, or in which results need a gradient: frozen layers
    below trained ones, for example. Then there is one block for each kind of call. An input of a block needs a gradient
    where it does in any of its calls. Blocks are named in the order of their first calls.
    """
    root = graph.root
    needed = {name: graph.parameters[path].requires_grad for name, path in root.parameters.items()}
    kinds: dict[tuple[str, tuple[bool, ...], tuple[bool, ...]], Block] = {}
    inputs_of: dict[str, list[bool]] = {}
    counts: dict[str, int] = {}
    for node in root.nodes:
        if not isinstance(node, Call):
            _follow(root, [node], needed)
            continue
        block = graph.blocks[node.block]
        inputs = [needed.get(name, False) for name in node.inputs]
        trained = {name: graph.parameters[node.parameters[name]].requires_grad for name in block.parameters}
        inside = _inside(block, trained, inputs)
        results = [inside[name] for name in block.outputs]  # a block's nodes know how it is called
        kind = node.block, tuple(trained.values()), tuple(results)
        if kind not in kinds:
            kinds[kind] = replace(block, name=_name(block.module_type, counts), nodes=copy.deepcopy(block.nodes))
            inputs_of[kinds[kind].name] = inputs
        name = node.block = kinds[kind].name
        inputs_of[name] = [one or other for one, other in zip(inputs_of[name], inputs)]
        needed.update(zip(node.outputs, results, strict=True))
    _mark(root, needed)
    for (_, trained_, _), block in kinds.items():
        _mark(block, _inside(block, dict(zip(block.parameters, trained_)), inputs_of[block.name]))
    graph.blocks = {block.name: block for block in kinds.values()}
    unreached = _trained(graph) - _reached(graph)
    if unreached:
        for path in unreached:
            graph.parameters[path] = replace(graph.parameters[path], requires_grad=False)
        mark_gradients(graph)


def _trained(graph: Graph) -> set[str]:
    return {path for path, meta in graph.parameters.items() if meta.requires_grad}


def _reached(graph: Graph) -> set[str]:
    """The parameters that the outputs' gradients reach. All others are as good as frozen, as in PyTorch."""
    paths: set[str] = set()

    def read(node: Node, found: set[str]) -> list[str]:
        if not isinstance(node, Call):
            return node.inputs
        called = graph.blocks[node.block]
        outputs = {inner for inner, outer in zip(called.outputs, node.outputs) if outer in found}
        inside = _follow_back(called, outputs, lambda node, found: node.inputs)
        paths.update(path for name, path in node.parameters.items() if name in inside)
        return [outer for inner, outer in zip(called.inputs, node.inputs) if inner in inside]

    found = _follow_back(graph.root, set(graph.root.outputs), read)
    return paths.union(path for name, path in graph.root.parameters.items() if name in found)


def _follow_back(block: Block, begin: set[str], read: Callable[[Node, set[str]], list[str]]) -> set[str]:
    """The tensors of a block that gradients of some of them reach.

    read  the inputs of a node that those of its results do which are among the given tensors
    """
    found = {name for name in begin if block.tensors[name].requires_grad}
    for node in reversed(block.nodes):
        if found.intersection(node.outputs):
            found.update(name for name in read(node, found) if block.tensors[name].requires_grad)
    return found


def _inside(block: Block, trained: Mapping[str, bool], inputs: Sequence[bool]) -> dict[str, bool]:
    """Name of a tensor in a block -> whether it needs a gradient."""
    needed = {**trained, **dict(zip(block.inputs, inputs, strict=True))}
    _follow(block, block.nodes, needed)
    return needed


def _follow(block: Block, nodes: Iterable[Node], needed: dict[str, bool]) -> None:
    for node in nodes:
        passes = any(needed.get(name) for name in node.inputs) and not node.no_grad and node.op not in _STOP
        for name in node.outputs:
            dtype = block.tensors[name].dtype
            needed[name] = passes and (dtype.is_floating_point or dtype.is_complex)


def _mark(block: Block, needed: Mapping[str, bool]) -> None:
    block.tensors = {name: replace(meta, requires_grad=needed.get(name, False)) for name, meta in block.tensors.items()}


def _name(module_type: str, counts: dict[str, int]) -> str:
    """A name for a block: `decoder_layer` for the class `DecoderLayer`, then `decoder_layer_2`."""
    base = "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in module_type).lstrip("_")
    counts[base] = counts.get(base, 0) + 1
    return base if counts[base] == 1 else f"{base}_{counts[base]}"
