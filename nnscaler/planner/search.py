"""The search for the best plan: for each mesh a program is stated and solved, and the fastest solution is taken."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf

from nnscaler.chains import chains
from nnscaler.errors import UserError
from nnscaler.graph import Call, Graph
from nnscaler.hardware import Hardware
from nnscaler.mesh import Mesh
from nnscaler.placement import Placements
from nnscaler.plan import GIB, Key, Plan
from nnscaler.planner.bodies import Bodies
from nnscaler.planner.costs import CostModel
from nnscaler.planner.flows import in_fp8
from nnscaler.planner.masters import may_save_time
from nnscaler.planner.options import CannotBePinned
from nnscaler.planner.price import Price, price
from nnscaler.planner.problem import Problem, Recomputing, build_problem
from nnscaler.planner.program import Program, Solution
from nnscaler.planner.refusal import WEIGHTS, DoesNotFit, NotFaster, NothingFits
from nnscaler.planner.solve import OutOfTime, least_bytes, least_memory, least_seconds, relaxed, solve
from nnscaler.profiler.operators import OperatorTimes
from nnscaler.searched import Findings, Searched
from nnscaler.sums import IN_FP32, GradientSum

logger = logging.getLogger(__name__)

WORTH = 1e-3  # part of the step time that a mesh of more axes must save
SPARING = 5e-3  # part of it that what saves memory at a price must save
LEAST_SECONDS = 5.0  # of the search for the plan that takes least memory, where time is out
NEAR = 2 * WORTH  # a plan is called the best where it is proven to be so near to it
TOLERANCE = 1e-5  # of a solver, in the memory row
SEARCH_SECONDS = 40.0
EACH = 4.0  # seconds between two lines on how far the search is


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
    sums: GradientSum = IN_FP32,
    layouts: Mapping[str, Placements] | None = None,
    in_flight: int = 1,
    waiting: Sequence[tuple[int, int]] = (),
    seconds: float = SEARCH_SECONDS,
    host: float = 0.0,
    sparing: bool = True,
    groups: bool = True,
    below: float = inf,
    decided: bool = True,
) -> Plan:
    """The plan of least predicted step time on one of the meshes, which all have as many devices and as many copies.

    memory             bytes a device that the plan may use; default: 90 % of the hardware's
    recompute_modules  names of classes: what their modules compute, and nothing else, is computed again in backward;
                       None: the planner chooses
    micro_batches      how many a step has (gradient accumulation)
    fused              whether regions will be compiled, so that a cluster of cheap operators runs as one kernel
    times              measured times of operators, where the hardware is present
    sums               how devices add up their gradients
    layouts            name of a parameter, or of an input or output of the graph -> its layout, where that is given
    in_flight          micro-batches whose activations are held at a time
    waiting            of a stage that may run backward in two parts: see `nnscaler.schedules.waiting`
    seconds            of processor time, after which the best plan so far is taken
    decided            whether, where there is none then, the search goes on until it is known whether one fits, and a
                       refusal says what the memory is needed for
    host               bytes of the host's memory that the plan may use for each device
    sparing            whether what else saves memory at a price is tried: see `build_problem`
    groups             whether groups of layers may be computed again together, and pieces resharded inside
    below              seconds of a step; only a plan that takes less is wanted

    The host's memory, and what else is sparing, are tried only where more memory would make the plan faster, or where
    no plan fits; and after that groups, of which there are many, where that is still so.

    Raises NothingFits where no plan fits, NotFaster where none takes less than `below`, and UserError for an unknown
    class name.
    """
    memory = 0.9 * hardware.memory if memory is None else memory
    again = recomputing(graph, recompute_modules)
    started = time.perf_counter()
    costs = [CostModel(hardware, mesh, fused, times, sums) for mesh in meshes]
    known: Bodies = {}

    def problem(model: CostModel, host: float, sparing: bool, groups: bool) -> Problem:
        found = build_problem(graph, model, again, micro_batches, layouts, in_flight, host, sparing, groups, known)
        found.waiting = waiting
        return found

    def freest(program: Program) -> Program:
        faster = sparing and may_save_time(program.problem)
        return Program(problem(program.problem.costs, 0.0, True, False)) if faster else program

    programs, refused = [], None
    for model in costs:
        try:
            programs.append(Program(problem(model, 0.0, False, False)))
        except CannotBePinned as error:
            refused = refused or error
    if refused is not None and not programs:
        raise refused
    groups = groups and again.free and any(len(chain) > 1 for chain in chains(graph))
    began = time.process_time()
    search = _Search(memory, began + seconds, below / micro_batches, findings=Findings(began), freest=freest)
    widest = [*programs]  # of each mesh, the program with most choices
    for place, program in enumerate(programs, 1):
        search.on(program, len(programs) - place)
    for allowed in [
        *([(host, sparing, False)] if host or sparing else []),
        *([(host, sparing, True)] if groups else []),
    ]:
        for place, program in enumerate(programs, 1):
            if search.leaves(program):
                continue
            widest[place - 1] = Program(problem(program.problem.costs, *allowed))
            search.on(widest[place - 1], len(programs) - place)
    if search.found is None and below < inf:
        raise NotFaster(max(search.bound, min(search.floors.values())) * micro_batches)
    if search.found is None and not decided:
        raise NothingFits("no plan that fits was found in time")
    search.decide()
    if search.found is None:
        refusal = DoesNotFit(*_least(widest[0]), memory)
        refusal.at_any_length = refusal.weights > memory and all(
            least_bytes(program, WEIGHTS) > memory for program in widest
        )
        raise refusal
    found = search.found
    plan = _to_plan(graph, found.problem, found.solution, found.price, micro_batches)
    plan.costs, plan.memory_limit, plan.bound = found.problem.costs, memory, search.proven(programs) * micro_batches
    plan.host_limit = host
    steps = [(spent, step * micro_batches) for spent, step in search.findings.found]
    plan.searched = Searched(seconds, search.stopped, steps)
    logger.info(
        "planned %s on %s in %.1f s: %.3g s a step%s, %.3g GiB of %.3g GiB a device",
        plan.mesh, hardware.name, time.perf_counter() - started, plan.step_seconds,
        may_save(plan.gap),
        plan.memory_bytes / GIB, memory / GIB,
    )  # fmt: skip
    return plan


def may_save(gap: float) -> str:
    """What is said of a plan that may lose a part `gap` of its time to a better one."""
    return "" if gap <= NEAR else f" (a faster one may save up to {100 * gap:.2g} %)"


def least_step(
    graph: Graph,
    mesh: Mesh,
    hardware: Hardware,
    *,
    memory: float | None = None,
    recompute_modules: Sequence[str] | None = None,
    micro_batches: int = 1,
    fused: bool = False,
    times: OperatorTimes | None = None,
    sums: GradientSum = IN_FP32,
    host: float = 0.0,
) -> float:
    """Seconds of a step that no plan on a mesh takes less than: those where choices may be made in parts, which is soon
    known. Arguments are those of `find_plan`.

    Raises NothingFits, with the bytes that are needed at least, where no plan fits.
    """
    memory = 0.9 * hardware.memory if memory is None else memory
    again = recomputing(graph, recompute_modules)
    model = CostModel(hardware, mesh, fused, times, sums)
    program = Program(build_problem(graph, model, again, micro_batches, None, 1, host, True, again.free))
    found = relaxed([program], memory)
    if found is not None:
        return found[0].seconds * micro_batches
    refusal = NothingFits(f"no plan fits: over {memory / GIB:.1f} GiB a device are needed")
    refusal.needed = least_bytes(program)
    raise refusal


@dataclass(frozen=True)
class _Found:
    problem: Problem
    solution: Solution
    price: Price


@dataclass
class _Search:
    """The search over meshes, one after the other, until `time.process_time()` is `until`.

    wanted     seconds of a micro-batch; only plans that take less count
    found      the best plan so far
    bound      seconds of a micro-batch; no plan on the meshes tried so far takes less
    floors     seconds of a micro-batch; no plan on a mesh takes less, whatever its memory. Of meshes asked for so far
    undecided  mesh -> its last program, where time was out before it was known whether a plan fits
    told       when the log last said how far the search is
    stopped    whether something was left unsearched for want of time
    findings   seconds of a micro-batch of the best plans so far
    freest     a mesh's first program -> one in which all may be done that could make a plan faster, had it all memory
    """

    memory: float
    until: float
    wanted: float = inf
    found: _Found | None = None
    bound: float = inf
    floors: dict[Mesh, float] = field(default_factory=dict)
    undecided: dict[Mesh, Program] = field(default_factory=dict)
    told: float = field(default_factory=time.perf_counter)
    stopped: bool = False
    findings: Findings = field(default_factory=lambda: Findings(time.process_time()))
    freest: Callable[[Program], Program] = lambda program: program

    def on(self, program: Program, left: int) -> None:
        """Searches one mesh; `left` more are to come, which get half of the time that is left."""
        mesh = program.problem.costs.mesh
        below = self._below(WORTH)
        if below is not None and not self.may_gain(program, WORTH):
            self.bound = min(self.bound, below)
            return
        if below is not None and time.process_time() >= self.until:
            self.bound, self.stopped = min(self.bound, self.floors[mesh]), True
            return
        seconds = max(self.until - time.process_time(), 0.1) / (2 if left else 1)

        faster = "" if self.found is None else "faster "

        def watch(best: float, bound: float) -> None:
            if best < inf:
                self.findings.add(time.process_time(), best)
            if time.perf_counter() - self.told < EACH:
                return
            self.told = time.perf_counter()
            known = f"the best plan takes {best:.4g} s a micro-batch" if best < inf else f"no {faster}plan found yet"
            limit = f", and none takes less than {bound:.4g} s" if bound > 0 else ""
            left = self.until - time.process_time()
            logger.info("planning on %s: %s%s; the search may take %.0f s more of a core", mesh, known, limit, left)

        try:
            solved = solve(program, self.memory, below=below, seconds=seconds, watch=watch)
            if solved is not None:
                self._take(program, solved.solution, limited=True)
                self.bound, self.stopped = min(self.bound, solved.bound), self.stopped or solved.stopped
            elif below is not None:
                self.bound = min(self.bound, below)
            else:
                self.undecided.pop(mesh, None)
        except OutOfTime as stopped:
            self.bound, self.stopped = min(self.bound, stopped.bound), True
            if below is None:
                self.undecided[mesh] = program
                self._take_least(program, LEAST_SECONDS)

    def decide(self) -> None:
        """Takes a plan of an undecided mesh where none was found at all: that nothing fits is only said where it is
        known."""
        for program in self.undecided.values():
            if self.found is None:
                self._take_least(program, inf)

    def _take_least(self, program: Program, seconds: float) -> None:
        """Takes a plan that fits, whatever its time, if one is found in so many seconds."""
        least = least_memory(program, seconds, self.memory)
        if least is not None and self._take(program, least):
            mesh = program.problem.costs.mesh
            logger.info("planning on %s: out of time; a plan that fits is taken", mesh)

    def may_gain(self, program: Program, worth: float) -> bool:
        """Whether a mesh could save a part `worth` of the time of the best plan so far.

        It could where it would with unlimited memory, and with choices that may be made in parts: that is soon known.
        `program`: any of the mesh
        """
        below = self._below(worth)
        if below is None:
            return True
        return self._floor(program) < below

    def leaves(self, program: Program) -> bool:
        """Whether what saves memory at a price is left unsearched on a mesh: where it could save too little, or time is
        out. What it could save all the same counts as not proven. `program`: any of the mesh"""
        if not self.may_gain(program, SPARING):
            self.bound = min(self.bound, self._floor(program))
            return True
        if self._below(SPARING) is not None and time.process_time() >= self.until:
            self.bound, self.stopped = min(self.bound, self._floor(program)), True
            return True
        return False

    def proven(self, programs: Sequence[Program]) -> float:
        """Seconds of a micro-batch that no plan takes less than, as far as is proven: where the solver had no time to
        prove much, those of choices that may be made in parts. `programs`: one of each mesh"""
        return max(self.bound, min(map(self._floor, programs))) if self.stopped else self.bound

    def _floor(self, program: Program) -> float:
        mesh = program.problem.costs.mesh
        if mesh not in self.floors:
            self.floors[mesh] = least_seconds(self.freest(program))
        return self.floors[mesh]

    def _below(self, worth: float) -> float | None:
        """What a plan has to take less than, in seconds of a micro-batch, to save a part `worth` of the time of the
        best so far; None: any will do."""
        if self.found is not None:
            return min(self.wanted, self.found.price.total_seconds * (1 - worth))
        return self.wanted if self.wanted < inf else None

    def _take(self, program: Program, solution: Solution, limited: bool = False) -> bool:
        """Takes a solution for the best so far, if it fits; says whether it does. `limited`: whether the solver was to
        keep to the memory, so that only its inexactness explains where it does not"""
        priced = price(program, solution)
        assert priced is not None, "what the program allows can be priced"
        fits = priced.total_memory <= self.memory * (1 + TOLERANCE)
        if fits:
            self.found = _Found(program.problem, solution, priced)
            self.findings.add(time.process_time(), priced.total_seconds)
        elif limited:
            logger.warning(
                "planning on %s: the solver's plan is not taken: it needs %.8g GiB a device, of %.8g GiB",
                program.problem.costs.mesh, priced.total_memory / GIB, self.memory / GIB,
            )  # fmt: skip
        return fits


def recomputing(graph: Graph, modules: Sequence[str] | None) -> Recomputing:
    """What the argument `recompute_modules` of `find_plan` means for this graph."""
    return Recomputing() if modules is None else Recomputing(False, nodes_to_recompute(graph, modules))


def nodes_to_recompute(graph: Graph, modules: Sequence[str]) -> dict[str, frozenset[str]]:
    """Block -> the names of its nodes that were called inside a module of one of the classes.

    Raises UserError for a class that the model does not have, or only outside repeated layers, and for one whose
    modules contain whole blocks.
    """
    found: dict[str, frozenset[str]] = {}
    known = {kind for block in graph.all_blocks() for node in block.nodes for kind in node.module_types}
    repeated = {kind for block in graph.blocks.values() for node in block.nodes for kind in node.module_types}
    for module in modules:
        if module not in known:
            has = ", ".join(sorted(known))
            raise UserError(f"recompute_modules names '{module}', which is not in the model; its modules are {has}")
    for block in graph.all_blocks():
        inside = [node for node in block.nodes if set(modules).intersection(node.module_types)]
        calls = [node for node in inside if isinstance(node, Call)]
        kinds = sorted({graph.blocks[call.block].module_type for call in calls})
        if (calls and len(calls) < len(inside)) or set(kinds) - set(modules):
            raise UserError(f"recompute_modules names a module that contains {', '.join(kinds)}; name those instead")
        names = frozenset(node.name for node in inside if not isinstance(node, Call))
        if names:
            found[block.name] = names
    for module in modules:
        if module not in repeated:
            has = f"modules inside them are {', '.join(sorted(repeated))}" if repeated else "there are none"
            raise UserError(
                f"recompute_modules names '{module}', which is not in repeated layers, and only these are computed "
                f"again; {has}"
            )
    return found


def _least(program: Program) -> tuple[dict[Key, float], str]:
    """Of the plan that needs least memory, as far as is known after LEAST_SECONDS: what the bytes are for, and the
    operator that holds most while it runs."""
    problem = program.problem
    solution = least_memory(program, LEAST_SECONDS) or least_memory(program)
    assert solution is not None, "it has all the time that it wants"
    priced = price(program, solution)
    assert priced is not None
    divided = [one for one in problem.divisible if (one.block, one.name) in solution.pieces]
    in_pieces = {decision for one in divided for decision in one.decisions}
    held = {
        f"{decision.block}.{decision.name}": decision.options[chosen].transient
        for index, (decision, chosen) in enumerate(zip(problem.decisions, solution.chosen))
        if index not in in_pieces
    }
    most = max(held, key=held.__getitem__)
    if divided and held[most] < 0.999 * priced.memory[Key("working")]:
        most = f"{divided[0].block} in pieces"
    return priced.memory, most


def _to_plan(
    graph: Graph,
    problem: Problem,
    solution: Solution,
    priced: Price,
    micro_batches: int,
) -> Plan:
    """The plan that a solution means, by the names of the graph."""
    costs = problem.costs
    plan = Plan(graph, costs.mesh, costs.hardware.name, micro_batches=micro_batches, sums=costs.sums)
    plan.seconds, plan.beside, plan.memory = priced.seconds, priced.beside, priced.memory
    plan.levels, plan.pieces = solution.levels, dict(solution.pieces)
    plan.host, plan.copies = priced.host, priced.copies
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
        if option.master_only:
            plan.master_only.add(path)
    for index in solution.gathered_again:
        flow = problem.flows[index]
        plan.gathered_again.add((flow.block, flow.tensor))
    chosen = [decision.options[index] for decision, index in zip(problem.decisions, solution.chosen)]
    for flow in problem.flows:
        source = chosen[flow.producer[0]].outputs[flow.producer[1]]
        for index, place in flow.consumers:
            if in_fp8(problem, flow, source, target := chosen[index].inputs[place]):
                plan.gathered_in_fp8.add((flow.block, flow.tensor, target))
    return plan
