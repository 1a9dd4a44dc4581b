"""Chains: calls of one block of which each takes what the one before it makes, such as the layers of a decoder."""

from __future__ import annotations

from nnscaler.graph import Block, Call, Graph


def chains(graph: Graph) -> list[list[Call]]:
    """The root's calls of blocks, in order, in chains as long as there are.

    Of the calls of a chain, each has one result, which only the next call takes; all else that they take is the same.
    """
    users: dict[str, list[str]] = {}
    for node in graph.root.nodes:
        for name in dict.fromkeys(node.inputs):
            users.setdefault(name, []).append(node.name)
    found: list[list[Call]] = []
    for node in graph.root.nodes:
        if isinstance(node, Call):
            if found and _continues(graph.root, users, found[-1][-1], node):
                found[-1].append(node)
            else:
                found.append([node])
    return found


def handed_on(chain: list[Call]) -> int:
    """The index of the argument that each call of a chain takes from the call before it."""
    return next(i for i, (a, b) in enumerate(zip(chain[0].inputs, chain[1].inputs)) if a != b)


def _continues(root: Block, users: dict[str, list[str]], before: Call, call: Call) -> bool:
    if call.block != before.block or len(before.outputs) != 1 or len(call.outputs) != 1:
        return False
    differs = [index for index, (a, b) in enumerate(zip(before.inputs, call.inputs)) if a != b]
    if len(differs) != 1 or call.inputs[differs[0]] != before.outputs[0]:
        return False
    return users.get(before.outputs[0]) == [call.name] and before.outputs[0] not in root.outputs
