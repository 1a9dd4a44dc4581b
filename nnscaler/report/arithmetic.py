"""How many operations a model's forward and backward are, whatever computes them."""

from __future__ import annotations

from nnscaler.graph import Block, Call, Graph
from nnscaler.operators import bind, operator_of
from nnscaler.operators.registry import no_flops

MOST_IN_BACKWARD = 2.0  # products for each one of forward: what a kernel computes once more is not the model's
A_TOKEN = 6.0  # operations for each parameter that no product reads, as if one did


def model_flops(graph: Graph, tokens: int) -> tuple[float, float]:
    """Operations of a micro-batch of so many tokens: with attention in full, and with what its masks leave.

    They are those of products, forward and backward. By the document's formula a parameter counts 6 for each token,
    also one that no product reads, such as a table of embeddings.
    """
    full = seen = A_TOKEN * tokens * _read_by_no_product(graph)
    for block in graph.all_blocks():
        for node in block.nodes:
            if isinstance(node, Call) or (operator := operator_of(node)).flops is no_flops:
                continue
            sizes = bind(node, block).sizes
            metas = [block.tensors[name] for name in node.inputs]
            trained = any(block.tensors[name].requires_grad for name in node.outputs)
            backward = min(operator.backward_ratio(node, metas), MOST_IN_BACKWARD) if trained else 0.0
            calls = graph.count(block) * (1 + backward)
            seen += calls * operator.flops(sizes, node)
            full += calls * (operator.unmasked or operator.flops)(sizes, node)
    return full, seen


def _read_by_no_product(graph: Graph) -> int:
    """Elements of parameters."""
    read = {block.name: _read_by_products(block) for block in graph.all_blocks()}
    multiplied = {path for block, name, path in graph.parameter_uses() if name in read[block.name]}
    return sum(meta.numel for path, meta in graph.parameters.items() if path not in multiplied)


def _read_by_products(block: Block) -> set[str]:
    """Parameters of a block that its products read, as they are or after what is done with parameters alone."""
    sources: dict[str, set[str]] = {name: {name} for name in block.parameters}
    found: set[str] = set()
    for node in block.nodes:
        known = [sources[name] for name in node.inputs if name in sources]
        if isinstance(node, Call):
            continue
        if operator_of(node).flops is not no_flops:
            found.update(*known)
        elif known and len(known) == len(node.inputs):
            sources.update(dict.fromkeys(node.outputs, set().union(*known)))
    return found
