"""Planning the stages of one candidate: a schedule, cut points, and a layout of what crosses between stages.

A candidate is *estimated* first. For each rank, the programs of its stages are solved together, within the rank's
memory, where a choice may be made in parts. That takes hundredths of a second a stage. The schedule is simulated with
the times that come out. No plan of the candidate is faster than that, except for how a stage's time is divided between
forward and backward.

Then the candidate is *planned*, stage after stage, with whole choices, each in the memory of device and host that the
estimate gave it. This ends early when the simulated step takes longer than the best plan that is known.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf, prod

from nnscaler.graph import Call, Graph, Node, Ref, TensorMeta, format_arguments, map_refs
from nnscaler.hardware import Hardware
from nnscaler.later import weight_seconds
from nnscaler.mesh import Mesh, PipelineMesh
from nnscaler.pipeline.cut import StageGraph, cut, shared_parameters
from nnscaler.pipeline.plan import PipelinePlan, forward_seconds, update_seconds
from nnscaler.pipeline.simulate import StageSeconds, simulate
from nnscaler.placement import REPLICATE, SHARED, Placements, local_shape
from nnscaler.plan import GIB, Key, Plan
from nnscaler.planner import NothingFits, find_plan
from nnscaler.planner.bodies import Bodies
from nnscaler.planner.costs import CostModel
from nnscaler.planner.masters import may_save_time
from nnscaler.planner.options import divides
from nnscaler.planner.problem import build_problem
from nnscaler.planner.program import Program
from nnscaler.planner.search import recomputing
from nnscaler.planner.solve import Needs, relaxed
from nnscaler.profiler.operators import OperatorTimes
from nnscaler.schedules import Schedule, actions, in_flight, waiting
from nnscaler.shards import boxes_of_copy, parts
from nnscaler.sums import IN_FP32, GradientSum

LEAST_SECONDS = 1.0  # for each stage, though time is out


@dataclass(frozen=True)
class Candidate:
    """A pipeline that may be planned.

    counts  how many pivots each stage has
    layout  of what crosses between stages, on the devices of each, where its shape allows this layout; else it is whole
    mesh    of the pipeline ranks
    splits  whether stages run backward in two parts, where they can, and where the schedule has two
    """

    schedule: Schedule
    counts: tuple[int, ...]
    layout: Placements
    mesh: PipelineMesh
    splits: bool = False


@dataclass(frozen=True)
class Estimate:
    """What a candidate would take at least, without its plans.

    needs         of each stage
    step_seconds  of the simulated step
    """

    candidate: Candidate
    needs: tuple[Needs, ...]
    step_seconds: float


@dataclass(frozen=True)
class _Stage:
    """A stage to be planned.

    mesh            the devices of its rank; their place among the nodes, which repeats, is all that `first` says
    like            equal for stages that are stated alike but for names
    count           micro-batches of a step
    held            micro-batches whose activations it holds at a time
    waiting         where it is to run backward in two parts: see `nnscaler.schedules.waiting`
    receive_buffers bytes into which torch receives from other stages: it has a buffer for each micro-batch
    layouts         name -> layout, of what crosses and of parameters that other stages use too
    """

    cut: StageGraph
    mesh: Mesh
    like: object
    count: int
    held: int
    receive_buffers: int
    layouts: Mapping[str, Placements]
    waiting: Sequence[tuple[int, int]] = ()

    @property
    def key(self) -> object:
        """Equal for stages whose plans differ only in names."""
        return self.like, self.held, self.waiting


@dataclass
class StagePlanner:
    """Plans stages, and remembers what it has planned.

    begins     indices of the root block's nodes at which stages may begin
    memory     bytes a device that the stages of a rank may use together
    until      when the search is to end, by `time.process_time`
    host       bytes a device of the host's memory that the stages of a rank may use together
    sparing    whether what else saves memory at a price is tried; see `build_problem`
    groups     whether they may compute groups of layers again together
    known      what is known of blocks
    layouts    mesh -> the layout of what crosses, once it has been chosen
    cuts       counts of pivots -> the stages' graphs
    stages     candidate -> its stages
    programs   `_Stage.like` -> its program, for one micro-batch in flight
    estimated  `_Stage.key` of each stage of a rank -> what each needs
    planned    `_Stage.key` -> [(bytes of device and of host that a plan was to fit into, the plan)]
    """

    graph: Graph
    hardware: Hardware
    memory: float
    recompute_modules: Sequence[str] | None
    fused: bool
    times: OperatorTimes | None
    begins: list[int]
    until: float = inf
    host: float = 0.0
    sparing: bool = False
    groups: bool = False
    sums: GradientSum = IN_FP32
    known: Bodies = field(default_factory=dict)
    layouts: dict[PipelineMesh, Placements] = field(default_factory=dict)
    cuts: dict[tuple[int, ...], list[StageGraph]] = field(default_factory=dict)
    stages: dict[Candidate, list[_Stage]] = field(default_factory=dict)
    programs: dict[object, Program] = field(default_factory=dict)
    estimated: dict[object, list[Needs] | None] = field(default_factory=dict)
    planned: dict[object, list[tuple[float, float, Plan]]] = field(default_factory=dict)

    def cut(self, counts: tuple[int, ...]) -> list[StageGraph]:
        """The stages' graphs, where each stage has so many of `begins`."""
        if counts not in self.cuts:
            self.cuts[counts] = cut(self.graph, [self.begins[sum(counts[:index])] for index in range(1, len(counts))])
        return self.cuts[counts]

    def estimate(self, candidate: Candidate) -> Estimate:
        """The estimate of a candidate. Raises UserError where the stages of a rank do not fit into its memory."""
        schedule, stages = candidate.schedule, self._stages(candidate)
        found: dict[int, Needs] = {}
        for rank in range(schedule.ranks):
            mine = schedule.stages_of(rank)
            found.update(zip(mine, self._estimate([stages[stage] for stage in mine])))
        needs = tuple(found[index] for index in range(schedule.stages))
        return Estimate(candidate, needs, self._simulate(candidate, self._guess(candidate, needs)))

    def plan(self, estimate: Estimate, below: float = float("inf")) -> PipelinePlan | None:
        """The plan of an estimated candidate. None where its step takes `below` seconds or more.

        Raises UserError where a stage does not fit into the memory that the estimate gave it.
        """
        candidate, schedule, needs = estimate.candidate, estimate.candidate.schedule, estimate.needs
        stages = self._stages(candidate)
        seconds = self._guess(candidate, needs)
        mine = [[needs[stage] for stage in schedule.stages_of(rank)] for rank in range(schedule.ranks)]
        free = [self.memory - sum(each.device for each in those) for those in mine]
        free_host = [max(0.0, self.host - sum(each.host for each in those)) for those in mine]
        plans: dict[int, Plan] = {}
        for index in sorted(range(schedule.stages), key=lambda i: -needs[i].seconds):
            rank = schedule.rank_of(index)
            limits = needs[index].device + free[rank], needs[index].host + free_host[rank]
            plan = plans[index] = self._plan(stages[index], *limits)
            free[rank], free_host[rank] = limits[0] - plan.memory_bytes, limits[1] - plan.host_bytes
            seconds[index] = self._seconds(plan, update=True)
            if self._simulate(candidate, seconds) >= below:
                return None
        found = self._assemble(candidate, stages, [plans[index] for index in range(schedule.stages)])
        found.bound = self._least_seconds(estimate)
        return found

    def _least_seconds(self, estimate: Estimate) -> float:
        """Seconds of a step that none of a candidate takes less than: those that the busiest rank works at least.

        Where what saves memory at a price was left out, no more of it is needed than with unlimited memory. And where
        backward is to run in two parts, stages may run it whole, which takes less memory.
        """
        schedule, needs = estimate.candidate.schedule, estimate.needs
        if not self.sparing:
            needs = replace(self, memory=inf, estimated={}).estimate(estimate.candidate).needs
        elif estimate.candidate.splits:
            needs = self.estimate(replace(estimate.candidate, splits=False)).needs
        of_ranks = (schedule.stages_of(rank) for rank in range(schedule.ranks))
        return max(sum(needs[stage].seconds for stage in mine) for mine in of_ranks) * schedule.micro_batches

    def _assemble(self, candidate: Candidate, stages: Sequence[_Stage], plans: Sequence[Plan]) -> PipelinePlan:
        schedule = candidate.schedule
        timeline = simulate(
            schedule, actions(schedule), [self._seconds(plan) for plan in plans], self._transfers(candidate)
        )
        crossing = [{name: stage.cut.graph.root.tensors[name] for name in stage.cut.sent} for stage in stages[:-1]]
        shared = shared_parameters([stage.cut.graph for stage in stages])
        own = [_renamed(plan, stage.cut.graph) for plan, stage in zip(plans, stages)]
        splits, held = [plan.splits for plan in plans], [stage.held for stage in stages]
        return PipelinePlan(own, schedule, crossing, shared, splits, held, timeline, self.memory, self.host)

    def _stages(self, candidate: Candidate) -> list[_Stage]:
        if candidate not in self.stages:
            self.stages[candidate] = self._find_stages(candidate)
        return self.stages[candidate]

    def _find_stages(self, candidate: Candidate) -> list[_Stage]:
        schedule, stages = candidate.schedule, self.cut(candidate.counts)
        shared = shared_parameters([stage.graph for stage in stages], trained=False)
        found = []
        for index, stage in enumerate(stages):
            rank, count, tensors = schedule.rank_of(index), schedule.micro_batches, stage.graph.root.tensors
            own, mesh = actions(schedule)[rank], self._as_planned(candidate.mesh.ranks[rank])
            held, later = in_flight(own, index), tuple(waiting(own, index)) if candidate.splits else ()
            layouts = {name: _fitting(tensors[name].shape, candidate.layout, mesh) for name in _crossing(stage)}
            size = sum(_local_bytes(tensors[name], layouts[name], mesh) for name in _crossing(stage))
            # All stages that have a parameter store it alike, so that their gradients can be added as they lie, and it
            # is saved once.
            for name in shared:
                if name in stage.graph.parameters:
                    trained = stage.graph.parameters[name].requires_grad
                    layouts[name] = ((SHARED if trained else REPLICATE),) * len(mesh.sizes)
            like = (_likeness(stage.graph), tuple(layouts.values()), count, mesh)
            found.append(_Stage(stage, mesh, like, count, held, count * size, layouts, later))
        return found

    def _as_planned(self, mesh: Mesh) -> Mesh:
        """The devices of a pipeline rank. Those whose groups lie on nodes alike become equal."""
        per_node = self.hardware.devices_per_node
        first = mesh.first % per_node
        return replace(mesh, first=first if first + mesh.runtime_ngpus > per_node else 0)

    def _estimate(self, stages: Sequence[_Stage]) -> list[Needs]:
        """What each of a rank's stages needs."""
        unlimited = self.memory == inf  # each stage has what it wants, however many micro-batches it holds
        if unlimited and len(stages) > 1:
            return [needs for stage in stages for needs in self._estimate([stage])]
        key = stages[0].like if unlimited else tuple(stage.key for stage in stages)
        if key not in self.estimated:
            programs = [self._freest(one) if unlimited else self._program(one) for one in stages]
            if not unlimited:
                programs = [program.holding(one.held, one.waiting) for program, one in zip(programs, stages)]
            buffers = [stage.receive_buffers for stage in stages]
            found = relaxed(programs, self.memory - sum(buffers))
            self.estimated[key] = found and [
                each._replace(device=each.device + more) for each, more in zip(found, buffers)
            ]
        figures = self.estimated[key]
        if figures is None:
            held = " and ".join(str(stage.held) for stage in stages)
            over = f"over {self.memory / GIB:.4g} GiB a device"
            raise NothingFits(f"a rank with {held} micro-batches of its stages in flight needs {over}")
        return figures

    def _program(self, stage: _Stage) -> Program:
        if stage.like not in self.programs:
            graph = stage.cut.graph
            costs = CostModel(self.hardware, stage.mesh, self.fused, self.times, self.sums)
            again = recomputing(graph, self._recomputed(graph))
            problem = build_problem(
                graph, costs, again, stage.count, stage.layouts, host=self.host, sparing=self.sparing,
                groups=self.groups, known=self.known,
            )  # fmt: skip
            self.programs[stage.like] = Program(problem)
        return self.programs[stage.like]

    def _freest(self, stage: _Stage) -> Program:
        """The program in which all may be done that could make a stage faster, had it all memory."""
        program = self._program(stage)
        if self.sparing or not may_save_time(program.problem):
            return program
        return replace(self, sparing=True, programs={})._program(stage)

    def _plan(self, stage: _Stage, limit: float, host: float) -> Plan:
        """The plan of a stage within `limit` bytes of the device, and `host` bytes of the host.

        A plan that was found for more memory is taken, if it fits.
        """
        known = self.planned.setdefault(stage.key, [])
        for allowed, allowed_host, plan in known:
            if allowed >= limit >= plan.memory_bytes and allowed_host >= host >= plan.host_bytes:
                return plan
        graph = stage.cut.graph
        plan = find_plan(
            graph, [stage.mesh], self.hardware, memory=limit - stage.receive_buffers,
            recompute_modules=self._recomputed(graph), micro_batches=stage.count, fused=self.fused, times=self.times,
            sums=self.sums, layouts=stage.layouts, in_flight=stage.held, waiting=stage.waiting, host=host,
            sparing=self.sparing, groups=self.groups, seconds=max(self.until - time.process_time(), LEAST_SECONDS),
        )  # fmt: skip
        plan.splits = bool(stage.waiting) and _can_split(plan)
        plan.memory[Key("buffers", "", "received")] = stage.receive_buffers
        plan.memory_limit, plan.searched = limit, None
        known.append((limit, host, plan))
        return plan

    def _recomputed(self, stage: Graph) -> list[str] | None:
        """Those classes of `recompute_modules` that this stage has."""
        if self.recompute_modules is None:
            return None
        there = {kind for block in stage.all_blocks() for node in block.nodes for kind in node.module_types}
        return [name for name in self.recompute_modules if name in there]

    def _seconds(self, plan: Plan, update: bool = False) -> StageSeconds:
        """A stage's seconds in the schedule.

        update  whether the optimizer's update counts as a part of backward; else it comes after the schedule
        Where backward is split, its second part computes gradients of weights, and nothing again.
        """
        forward = forward_seconds(plan)
        backward = sum(plan.seconds.values()) - forward - (0.0 if update else update_seconds(plan))
        weights = weight_seconds(plan)
        return StageSeconds(forward, backward, backward - weights, weights)

    def _guess(self, candidate: Candidate, needs: Sequence[Needs]) -> list[StageSeconds]:
        """The stages' seconds in the schedule, where only their sums are known: backward takes twice as long as
        forward."""
        thirds = [each.seconds / 3 for each in needs]
        return [
            StageSeconds(third, 2 * third, *((third, third) if candidate.splits else (2 * third, 0.0)))
            for third in thirds
        ]

    def _simulate(self, candidate: Candidate, stages: Sequence[StageSeconds]) -> float:
        """Seconds of a step."""
        schedule = candidate.schedule
        return simulate(schedule, actions(schedule), stages, self._transfers(candidate)).seconds

    def _transfers(self, candidate: Candidate) -> list[float]:
        """Seconds of a transfer from each stage to the next, or of its gradient back, where that takes longer."""
        schedule, seconds = candidate.schedule, []
        for index, stage in enumerate(self.cut(candidate.counts)[:-1]):
            ranks = schedule.rank_of(index), schedule.rank_of(index + 1)
            if ranks[0] == ranks[1]:
                seconds.append(0.0)
                continue
            meshes, tensors = [candidate.mesh.ranks[rank] for rank in ranks], stage.graph.root.tensors
            moved: tuple[Counter[int], Counter[int]] = Counter(), Counter()  # there and back, by device
            far = False
            for name in stage.sent:
                shape, size = tensors[name].shape, tensors[name].dtype.itemsize
                for copy in range(meshes[0].replicas):
                    before, after = (
                        boxes_of_copy(shape, _fitting(shape, candidate.layout, mesh), mesh, copy) for mesh in meshes
                    )
                    for way, some in zip(moved, (parts(before, after), parts(after, before))):
                        for part in some:
                            way[part.sender] += size * prod(part.box.sizes)
                            way[part.receiver] += size * prod(part.box.sizes)
                            far |= self._node(part.sender) != self._node(part.receiver)
            link = self.hardware.inter if far else self.hardware.intra
            seconds.append(link.latency + max(max(way.values()) for way in moved) / link.bandwidth)
        return seconds

    def _node(self, rank: int) -> int:
        return rank // self.hardware.devices_per_node


def _fitting(shape: tuple[int, ...], layout: Placements, mesh: Mesh) -> Placements:
    """The layout on a mesh, if a shape allows it; else whole on each device."""
    whole = (REPLICATE,) * len(mesh.sizes)
    deepest = max((getattr(place, "dim", 0) for place in layout), default=0)
    if deepest >= len(shape) or not divides(shape, layout, mesh):
        return whole
    return tuple(REPLICATE if size == 1 else place for place, size in zip(layout, mesh.sizes, strict=True))


def _local_bytes(meta: TensorMeta, layout: Placements, mesh: Mesh) -> int:
    """Bytes of a device's part of a tensor."""
    return meta.dtype.itemsize * prod(local_shape(meta.shape, layout, mesh.sizes))


def _can_split(plan: Plan) -> bool:
    """Whether a stage can run backward in two parts.

    Weights that are gathered get their gradients at once; so do regions in pieces. What calls keep on the host comes
    back for one backward.
    """
    gathers = Key("buffers", "", "gathered early") in plan.memory
    fetches = any(level.on_host for counts in plan.levels.values() for level in counts)
    return not (gathers or fetches or plan.pieces)


def _crossing(stage: StageGraph) -> tuple[str, ...]:
    return (*stage.received, *stage.sent)


def _likeness(graph: Graph) -> object:
    """Equal for graphs that differ only in the names of tensors of the root block, and of parameters."""
    place = {name: index for index, name in enumerate(_names(graph))}
    nodes = tuple(
        (node.op, node.block if isinstance(node, Call) else "", _arguments(node, place), node.no_grad, node.pinned)
        for node in graph.root.nodes
    )
    parameters = {path: index for index, path in enumerate(dict.fromkeys(path for *_, path in graph.parameter_uses()))}
    uses = tuple((parameters[path], graph.stored.get(path)) for *_, path in graph.parameter_uses())
    metas = tuple(graph.root.tensors[name] for name in _names(graph))
    return nodes, uses, metas, tuple(place[name] for name in graph.root.outputs)


def _arguments(node: Node, place: Mapping[str, int]) -> str:
    """A node's arguments as text, with each tensor's place among all."""
    args, kwargs = map_refs((node.args, node.kwargs), lambda ref: Ref(str(place[ref.name])))
    return format_arguments(args, kwargs)


def _names(graph: Graph) -> list[str]:
    """Names of the root block's tensors, in an order that graphs which are alike share."""
    root = graph.root
    return list(
        dict.fromkeys([*root.inputs, *root.parameters, *(name for node in root.nodes for name in node.outputs)])
    )


def _renamed(plan: Plan, graph: Graph) -> Plan:
    """A plan that was made for another graph that is like this one, with the names of this one."""
    if plan.graph is graph:
        return plan
    root = graph.root.name
    names = dict(zip(_names(plan.graph), _names(graph), strict=True))
    nodes = zip(plan.graph.root.nodes, graph.root.nodes, strict=True)
    names |= {old.name: new.name for old, new in nodes}
    paths = {old: new for (*_, old), (*_, new) in zip(plan.graph.parameter_uses(), graph.parameter_uses(), strict=True)}

    def key(old: Key) -> Key:
        return old._replace(name=names.get(old.name, old.name)) if old.block == root else old

    def place(old: tuple[str, str]) -> tuple[str, str]:
        return (root, names.get(old[1], old[1])) if old[0] == root else old

    return replace(
        plan,
        graph=graph,
        nodes={place(old): value for old, value in plan.nodes.items()},
        parameters={paths[old]: layout for old, layout in plan.parameters.items()},
        exchanged_once={paths[old] for old in plan.exchanged_once},
        master_only={paths[old] for old in plan.master_only},
        gathered_again={place(old) for old in plan.gathered_again},
        gathered_in_fp8={(*place(old[:2]), old[2]) for old in plan.gathered_in_fp8},
        recomputed={
            block: {place((block, name))[1] for name in found} for block, found in plan.recomputed.items()
        },
        seconds={key(old): value for old, value in plan.seconds.items()},
        memory={key(old): value for old, value in plan.memory.items()},
        beside={key(old): value for old, value in plan.beside.items()},
    )  # fmt: skip
