"""Products of which backward can compute the gradient of the weight later (see `nnscaler.runtime.later`): which these
are, in a graph and in a plan."""

from __future__ import annotations

from nnscaler.graph import Block, Call, Node, refs
from nnscaler.operators import operator_of
from nnscaler.operators.registry import arguments
from nnscaler.plan import Key, Plan
from nnscaler.units import divide


def factors(node: Node, block: Block) -> tuple[str, str] | None:
    """(what a product multiplies, its trained weight), where that weight's gradient can be computed later; else None.

    Nothing else in the block may use the weight: what it is then cannot also be a weight that waits.
    """
    if isinstance(node, Call) or node.no_grad or operator_of(node).later_text is None:
        return None
    given = arguments(node)
    x, weight = (name for factor in operator_of(node).factors for name in refs(given[factor]))
    uses = sum(other.inputs.count(weight) for other in block.nodes)
    is_trained = weight in block.parameters and block.tensors[weight].requires_grad
    return (x, weight) if is_trained and uses == 1 and weight not in block.outputs else None


def is_later(plan: Plan, block: Block, node: Node) -> bool:
    """Whether a plan leaves the gradient of a node's weight for later: that of a product not in fp8, with a weight that
    is used as it is stored."""
    found = factors(node, block) if plan.splits else None
    if found is None or (way := plan.nodes[block.name, node.name]).in_fp8:
        return False
    path = next(path for user, name, path in plan.graph.parameter_uses() if user is block and name == found[1])
    used = way.inputs[node.inputs.index(found[1])]
    layouts = zip(plan.parameters[path], used, plan.mesh.sizes)
    return all(stored == place for stored, place, devices in layouts if devices > 1)


def weight_seconds(plan: Plan) -> float:
    """Predicted seconds of a micro-batch in which gradients of weights are computed that were left for later."""
    seconds = 0.0
    for block in plan.graph.all_blocks():
        for unit in divide(block):
            if is_later(plan, block, unit.main):
                x, _ = factors(unit.main, block) or ("", "")
                share = 1 / (1 + block.tensors[x].requires_grad)  # as much as that of x, if there is that
                seconds += share * plan.seconds.get(Key("backward", block.name, unit.name), 0.0)
    return seconds
