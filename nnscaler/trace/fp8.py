"""Which products of a graph may be computed in fp8. Where it is faster, the planner does so.

They are products with weights inside repeated blocks, in bf16. What stands outside of these (embeddings, the head),
norms and attention stay as they are; and so does a product whose result chooses something, as that of a router does: a
rounding there would change the choice.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import replace

import torch

from nnscaler.graph import Block, Call, Graph, Node
from nnscaler.operators import operator_of
from nnscaler.units import node_kind


def allow_fp8(graph: Graph, keep: Collection[str] = ()) -> None:
    """Marks the products that may be computed in fp8.

    keep  "first", "last": the first or the last call of any block stays as it is. It gets a block of its own
    """
    calls = [node for node in graph.root.nodes if isinstance(node, Call)]
    ends = {"first": calls[:1], "last": calls[-1:]}
    kept = [call for place in keep for call in ends[place]]
    for name in dict.fromkeys(call.block for call in kept):
        of_block = [call for call in kept if call.block == name]
        if len(of_block) < len(graph.calls(name)):
            block = graph.blocks[name]
            own = f"{name}_in_bf16"
            graph.blocks[own] = replace(block, name=own, nodes=copy.deepcopy(block.nodes))
            for call in of_block:
                call.block = own
    for block in graph.blocks.values():
        if not any(call.block == block.name for call in kept):
            for node in block.nodes:
                node.may_be_fp8 = _may_be(node, block)


def _may_be(node: Node, block: Block) -> bool:
    if operator_of(node).fp8_text is None or any(block.tensors[name].dtype != torch.bfloat16 for name in node.inputs):
        return False
    return node.inputs[1] in block.parameters and not _chooses(node, block)


def _chooses(node: Node, block: Block) -> bool:
    """Whether cheap operators make whole numbers of a node's results."""
    reached = set(node.outputs)
    for other in block.nodes[block.nodes.index(node) + 1 :]:
        if node_kind(other) == "cheap" and reached.intersection(other.inputs):
            reached.update(other.outputs)
    return any(block.tensors[name].dtype in (torch.int32, torch.int64) for name in reached)
