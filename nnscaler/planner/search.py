"""graph + mesh + hardware -> the best plan that fits."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence

from nnscaler.errors import UserError
from nnscaler.graph import Call, Graph
from nnscaler.hardware import Hardware
from nnscaler.mesh import Mesh
from nnscaler.placement import Placements
from nnscaler.plan import GIB, Key, Plan
from nnscaler.planner.costs import CostModel
from nnscaler.planner.evaluate import Evaluation, evaluate
from nnscaler.planner.problem import Problem, Recomputing, build_problem
from nnscaler.planner.program import Program, Solution
from nnscaler.planner.solve import least_memory, solve
from nnscaler.profiler.operators import OperatorTimes

logger = logging.getLogger(__name__)

WORTH = 1e-3  # part of the step time that a mesh of more axes must save


def find_plan(
    graph: Graph,
    meshes: Sequence[Mesh],
    hardware: Hardware,
    *,
    memory: float | None = None,
    recompute_modules: Sequence[str] | None = None,
    micro_batches: int = 1,
    fused: bool = False,
    times: OperatorTimes | None = None,
    layouts: Mapping[str, Placements] | None = None,
    in_flight: int = 1,
) -> Plan:
    """The plan of least predicted step time on one of the meshes, all of as many devices and replicas.

    memory             bytes a device that the plan may use; 90 % of the hardware's by default
    recompute_modules  class names: what modules of these classes compute, and nothing else, is computed again in
                       backward; None: the planner chooses
    micro_batches      gradient accumulation steps of an optimizer step
    fused              whether blocks will be compiled, so that cheap operators run as one kernel
    times              measured times of operators, where the hardware is present
    layouts            of parameters, and of inputs and outputs of the graph, where they are given, by name
    in_flight          micro-batches whose activations are held at a time

    Raises UserError where nothing fits, with what takes most memory, and for unknown class names.
    """
    memory = 0.9 * hardware.memory if memory is None else memory
    again = recomputing(graph, recompute_modules)
    started = time.perf_counter()
    costs = [CostModel(hardware, mesh, fused, times) for mesh in meshes]
    problems = [build_problem(graph, model, again, micro_batches, layouts, in_flight) for model in costs]
    found: tuple[Problem, Solution, Evaluation] | None = None
    for problem in problems:
        below = None if found is None else found[2].total_seconds * (1 - WORTH)
        program = Program(problem)
        solution = solve(program, memory, below=below)
        if solution is not None:
            evaluation = evaluate(program, solution)
            assert evaluation is not None
            found = problem, solution, evaluation
    if found is None:
        raise UserError(_does_not_fit(problems[0], memory))
    problem, solution, evaluation = found
    logger.info(
        "planned %s on %s in %.1f s: %.3g s a step, %.3g GiB of %.3g GiB a device",
        problem.costs.mesh, hardware.name, time.perf_counter() - started,
        evaluation.total_seconds * micro_batches, evaluation.total_memory / GIB, memory / GIB,
    )  # fmt: skip
    plan = _to_plan(graph, problem, solution, evaluation, micro_batches)
    plan.costs, plan.memory_limit = problem.costs, memory
    return plan


def recomputing(graph: Graph, modules: Sequence[str] | None) -> Recomputing:
    """What `recompute_modules` of `find_plan` means for a graph."""
    return Recomputing() if modules is None else Recomputing(False, nodes_to_recompute(graph, modules))


def nodes_to_recompute(graph: Graph, modules: Sequence[str]) -> dict[str, frozenset[str]]:
    """Block -> names of its nodes that were called inside a module of one of the classes."""
    found: dict[str, frozenset[str]] = {}
    known = {kind for block in graph.all_blocks() for node in block.nodes for kind in node.module_types}
    for module in modules:
        if module not in known:
            raise UserError(
                f"recompute_modules has '{module}', which is not in the model; {', '.join(sorted(known))} are"
            )
    for block in graph.all_blocks():
        inside = [node for node in block.nodes if set(modules).intersection(node.module_types)]
        calls = [node for node in inside if isinstance(node, Call)]
        kinds = sorted({graph.blocks[call.block].module_type for call in calls})
        if (calls and len(calls) < len(inside)) or set(kinds) - set(modules):
            raise UserError(f"recompute_modules names a module that contains {', '.join(kinds)}; name those instead")
        names = frozenset(node.name for node in inside if not isinstance(node, Call))
        if names:
            found[block.name] = names
    return found


def _does_not_fit(problem: Problem, memory: float) -> str:
    program = Program(problem)
    evaluation = evaluate(program, least_memory(program))
    assert evaluation is not None
    largest = sorted(evaluation.memory.items(), key=lambda item: -item[1])[:4]
    items = ", ".join(f"{_describe(key)} {_gigabytes(size)}" for key, size in largest)
    return (
        f"no plan fits: needs {_gigabytes(evaluation.total_memory)} a device, constraint {_gigabytes(memory)}; "
        f"the largest items are {items}"
    )


def _gigabytes(size: float) -> str:
    return f"{size / GIB:.1f} GB" if size > GIB / 10 else f"{size / GIB:.2g} GB"


def _describe(key: Key) -> str:
    role = {
        "parameter": "parameter with its gradient and optimizer state",
        "saved": "activation",
        "inside": "activations inside",
        "working": "working memory of",
        "buffers": "buffers of the gradients' exchange",
    }[key.category]
    return f"{role} {key.block}{f'.{key.name}' if key.name else ''}".rstrip()


def _to_plan(
    graph: Graph,
    problem: Problem,
    solution: Solution,
    evaluation: Evaluation,
    micro_batches: int,
) -> Plan:
    """A solution by the names of the graph."""
    plan = Plan(graph, problem.costs.mesh, problem.costs.hardware.name, micro_batches=micro_batches)
    plan.seconds, plan.beside, plan.memory = evaluation.seconds, evaluation.beside, evaluation.memory
    plan.levels = solution.levels
    plan.weight_seconds = evaluation.weights
    for decision, index in zip(problem.decisions, solution.chosen):
        option = decision.options[index]
        if decision.kind == "unit":
            plan.nodes.update({(decision.block, name): way for name, way in option.ways})
        elif decision.kind != "parameter":
            side = plan.inputs if decision.kind == "input" else plan.outputs
            side.setdefault(decision.block, []).append(option.outputs[0])
        names = {name for name, _ in option.ways}
        if any(names & level.named for level in problem.levels[decision.block]):
            plan.recomputed.setdefault(decision.block, set()).update(names)
    for block, tensor, path in graph.parameter_uses():
        decision_index = problem.parameter_of[block.name, tensor]
        option = problem.decisions[decision_index].options[solution.chosen[decision_index]]
        plan.parameters[path] = option.outputs[0]
        if option.exchanged_once:
            plan.exchanged_once.add(path)
    for index in solution.gathered_again:
        flow = problem.flows[index]
        plan.gathered_again.add((flow.block, flow.tensor))
    return plan
