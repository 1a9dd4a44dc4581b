"""graph + mesh + hardware -> the best plan that fits."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from nnscaler.errors import UserError
from nnscaler.graph import Call, Graph
from nnscaler.hardware import Hardware
from nnscaler.mesh import Mesh
from nnscaler.plan import GIB, NodePlan, Plan
from nnscaler.planner.costs import CostModel
from nnscaler.planner.evaluate import Evaluation, evaluate
from nnscaler.planner.problem import Problem, build_problem
from nnscaler.planner.program import least_memory, solve

logger = logging.getLogger(__name__)


def find_plan(
    graph: Graph,
    mesh: Mesh,
    hardware: Hardware,
    *,
    memory: float | None = None,
    recompute_modules: Sequence[str] = (),
    micro_batches: int = 1,
) -> Plan:
    """The plan of least predicted step time.

    memory             bytes a device that the plan may use; 90 % of the hardware's by default
    recompute_modules  class names: what modules of these classes compute is computed again in backward
    micro_batches      gradient accumulation steps of an optimizer step

    Raises UserError where nothing fits, with what takes most memory, and for unknown class names.
    """
    memory = 0.9 * hardware.memory if memory is None else memory
    recomputed = nodes_to_recompute(graph, recompute_modules)
    costs = CostModel(hardware, mesh)
    started = time.perf_counter()
    problem = build_problem(graph, costs, recomputed, micro_batches)
    solution = solve(problem, memory)
    if solution is None:
        raise UserError(_does_not_fit(problem, memory))
    evaluation = evaluate(problem, solution.chosen)
    assert evaluation is not None
    logger.info(
        "planned %s on %s in %.1f s: %.3f s a step, %.1f GiB of %.1f GiB a device",
        mesh, hardware.name, time.perf_counter() - started,
        evaluation.total_seconds * micro_batches, evaluation.total_memory / GIB, memory / GIB,
    )  # fmt: skip
    return to_plan(graph, problem, solution.chosen, evaluation, hardware, recomputed, micro_batches)


def nodes_to_recompute(graph: Graph, modules: Sequence[str]) -> dict[str, set[str]]:
    """Block -> names of its nodes that were called inside a module of one of the classes."""
    found: dict[str, set[str]] = {}
    known = {kind for block in graph.all_blocks() for node in block.nodes for kind in node.module_types}
    for module in modules:
        if module not in known:
            raise UserError(
                f"recompute_modules has '{module}', which is not in the model; {', '.join(sorted(known))} are"
            )
    for block in graph.all_blocks():
        inside = [node for node in block.nodes if set(modules).intersection(node.module_types)]
        calls = [node for node in inside if isinstance(node, Call) and block is graph.root]
        outside = [node for node in calls if graph.blocks[node.block].module_type not in modules]
        if outside or (block is graph.root and calls and len(inside) > len(calls)):
            kinds = sorted({graph.blocks[node.block].module_type for node in calls})
            raise UserError(f"recompute_modules names a module that contains {', '.join(kinds)}; name those instead")
        names = {node.name for node in inside if not isinstance(node, Call)}
        if names:
            found[block.name] = names
    return found


def _does_not_fit(problem: Problem, memory: float) -> str:
    evaluation = evaluate(problem, least_memory(problem).chosen)
    assert evaluation is not None
    items = ", ".join(f"{_describe(key)} {_gigabytes(size)}" for key, size in evaluation.largest(4))
    return (
        f"no plan fits: needs {_gigabytes(evaluation.total_memory)} a device, constraint {_gigabytes(memory)}; "
        f"the largest items are {items}"
    )


def _gigabytes(size: float) -> str:
    return f"{size / GIB:.1f} GB" if size > GIB / 10 else f"{size / GIB:.2g} GB"


def _describe(key: tuple[str, str, str]) -> str:
    category, block, name = key
    role = {
        "parameter": "parameter with its gradient and optimizer state",
        "saved": "activation",
        "working": "working memory of",
        "recomputed": "recomputation of",
    }[category]
    return f"{role} {block}{f'.{name}' if name else ''}"


def to_plan(
    graph: Graph,
    problem: Problem,
    chosen: list[int],
    evaluation: Evaluation,
    hardware: Hardware,
    recomputed: dict[str, set[str]],
    micro_batches: int,
) -> Plan:
    """The chosen options by the names of the graph."""
    plan = Plan(graph, problem.costs.mesh, hardware.name, {}, {}, {}, {}, recomputed, micro_batches)
    plan.seconds, plan.memory = evaluation.seconds, evaluation.memory
    for decision, index in zip(problem.decisions, chosen):
        option = decision.options[index]
        if decision.kind == "node":
            plan.nodes[decision.block, decision.name] = NodePlan(option.label, option.inputs, option.outputs)
        elif decision.kind != "parameter":
            side = plan.inputs if decision.kind == "input" else plan.outputs
            side.setdefault(decision.block, []).append(option.outputs[0])
    for block, tensor, path in graph.parameter_uses():
        index = problem.parameter_of[block.name, tensor]
        plan.parameters[path] = problem.decisions[index].options[chosen[index]].outputs[0]
    return plan
