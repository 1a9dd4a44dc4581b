"""Planning the stages of one candidate: a schedule, cut points, and a layout for what crosses between stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod

from nnscaler.graph import Graph
from nnscaler.hardware import Hardware
from nnscaler.mesh import Mesh
from nnscaler.pipeline.cut import StageGraph, cut, shared_parameters
from nnscaler.pipeline.plan import PipelinePlan, forward_seconds, update_seconds
from nnscaler.pipeline.schedules import Schedule, in_flight, programs
from nnscaler.pipeline.simulate import StageSeconds, simulate
from nnscaler.placement import REPLICATE, SHARED, Placements, local_shape
from nnscaler.plan import Key, Plan
from nnscaler.planner import find_plan
from nnscaler.planner.options import divides
from nnscaler.profiler.operators import OperatorTimes


@dataclass(frozen=True)
class Candidate:
    """counts: pivots of each stage; layout: of what crosses, where its shape allows, else it crosses whole."""

    schedule: Schedule
    counts: tuple[int, ...]
    layout: Placements


@dataclass
class StagePlanner:
    """Plans stages on meshes of one pipeline rank's devices.

    mesh    of a pipeline rank
    begins  nodes of the root block at which stages may begin
    memory  bytes a device that the stages of a rank may use together
    known   plans by what they depend on: stages in the middle of a pipeline are alike
    """

    graph: Graph
    mesh: Mesh
    hardware: Hardware
    memory: float
    recompute_modules: Sequence[str] | None
    fused: bool
    times: OperatorTimes | None
    begins: list[int]
    known: dict[object, Plan] = field(default_factory=dict)

    def cut(self, counts: Sequence[int]) -> list[StageGraph]:
        """The stages with so many of `begins` each."""
        return cut(self.graph, [self.begins[sum(counts[:index])] for index in range(1, len(counts))])

    def bound(self, candidate: Candidate) -> PipelinePlan:
        """The plan in which every stage has its rank's memory for itself: no plan of the candidate is faster.

        Raises UserError where a stage does not fit even so.
        """
        return self._plan(candidate, [self.memory] * candidate.schedule.stages)

    def plan(self, candidate: Candidate, exact: bool = False) -> PipelinePlan:
        """The plan in which the stages of a rank share its memory as they would use it if they could.

        exact  whether each stage's plan is about its own parameters, not about those of a stage that is alike
        Raises UserError where a stage does not fit.
        """
        free = self.bound(candidate)
        limits = [self.memory] * candidate.schedule.stages
        if free.memory_bytes > self.memory:
            used = [plan.memory_bytes for plan in free.stages]
            for rank in range(candidate.schedule.ranks):
                mine = candidate.schedule.stages_of(rank)
                for stage in mine:
                    limits[stage] = self.memory * used[stage] / sum(used[other] for other in mine)
        return self._plan(candidate, limits, exact)

    def _plan(self, candidate: Candidate, limits: Sequence[float], exact: bool = False) -> PipelinePlan:
        schedule, counts, layout = candidate.schedule, candidate.counts, candidate.layout
        stages = self.cut(counts)
        steps = programs(schedule)
        held = [in_flight(steps[schedule.rank_of(stage)], stage) for stage in range(schedule.stages)]
        shared = shared_parameters([stage.graph for stage in stages])
        plans = [
            self._stage(stage, counts[i], candidate, shared, held[i], limits[i], i if exact else -1)
            for i, stage in enumerate(stages)
        ]
        timeline = simulate(
            schedule, steps, [self._seconds(plan) for plan in plans],
            [self._transfer(schedule, index, stage, layout) for index, stage in enumerate(stages[:-1])],
        )  # fmt: skip
        crossing = [{name: stage.graph.root.tensors[name] for name in stage.sent} for stage in stages[:-1]]
        return PipelinePlan(plans, schedule, crossing, shared, [self._splits(plan) for plan in plans], timeline)

    def _stage(
        self, stage: StageGraph, count: int, candidate: Candidate, shared: Mapping[str, Sequence[int]],
        held: int, limit: float, own: int,
    ) -> Plan:  # fmt: skip
        """The plan of a stage that holds `held` micro-batches within `limit`. The fastest that there is with one
        micro-batch and all of the rank's memory is taken where it fits, since it is soon found."""
        alike = (not stage.received, not stage.sent, count, candidate.schedule.micro_batches, candidate.layout, own)
        fastest = (alike, 1, self.memory)
        if fastest not in self.known:
            self.known[fastest] = self._find(stage, candidate, shared, 1, self.memory)
        grown = _holding(self.known[fastest], held)
        if grown.memory_bytes <= limit:
            return grown
        key = (alike, held, limit)
        if key not in self.known:
            self.known[key] = self._find(stage, candidate, shared, held, limit)
        return self.known[key]

    def _find(
        self, stage: StageGraph, candidate: Candidate, shared: Mapping[str, Sequence[int]], held: int, limit: float
    ) -> Plan:
        crossing = (*stage.received, *stage.sent)
        tensors = stage.graph.root.tensors
        layouts = {name: self._fitting(tensors[name].shape, candidate.layout) for name in crossing}
        # All stages that have a parameter store it alike, so that their gradients can be added as they lie.
        layouts.update({name: (SHARED,) * len(self.mesh.sizes) for name in shared if name in stage.graph.parameters})
        count = candidate.schedule.micro_batches
        # torch has a buffer for each micro-batch.
        buffers = count * sum(self._local_bytes(stage, name, candidate.layout) for name in crossing)
        plan = find_plan(
            stage.graph, [self.mesh], self.hardware, memory=limit - buffers, recompute_modules=self.recompute_modules,
            micro_batches=count, fused=self.fused, times=self.times, layouts=layouts, in_flight=held,
        )  # fmt: skip
        plan.memory[Key("buffers", "", "received")] = buffers
        return plan

    def _fitting(self, shape: tuple[int, ...], layout: Placements) -> Placements:
        whole = (REPLICATE,) * len(self.mesh.sizes)
        deepest = max((getattr(place, "dim", 0) for place in layout), default=0)
        return layout if deepest < len(shape) and divides(shape, layout, self.mesh) else whole

    def _local_bytes(self, stage: StageGraph, name: str, layout: Placements) -> int:
        """Bytes of a device's part of a tensor that crosses."""
        meta = stage.graph.root.tensors[name]
        return meta.dtype.itemsize * prod(local_shape(meta.shape, self._fitting(meta.shape, layout), self.mesh.sizes))

    def _seconds(self, plan: Plan) -> StageSeconds:
        """A stage's part of the schedule; the update of its parameters comes after it.

        Where backward is split, each part computes again what it needs of what was not kept.
        """
        again = sum(seconds for key, seconds in plan.seconds.items() if key.category in ("again", "reshard again"))
        forward = forward_seconds(plan)
        backward = sum(plan.seconds.values()) - update_seconds(plan) - forward
        if not self._splits(plan):
            return StageSeconds(forward, backward, backward, 0.0)
        weights = plan.weight_seconds
        return StageSeconds(forward, backward, backward - weights, weights + again)

    def _splits(self, plan: Plan) -> bool:
        """Whether a stage can run backward in two parts: compiled regions, and weights that are gathered, make both
        gradients at once."""
        gathers = Key("buffers", "", "gathered early") in plan.memory
        return not self.fused and not gathers

    def _transfer(self, schedule: Schedule, index: int, stage: StageGraph, layout: Placements) -> float:
        """Seconds from a stage to the next, each device to the one in its place."""
        ranks = schedule.rank_of(index), schedule.rank_of(index + 1)
        if ranks[0] == ranks[1]:
            return 0.0
        each = self.mesh.runtime_ngpus
        nodes = [{(rank * each + device) // self.hardware.devices_per_node for rank in ranks} for device in range(each)]
        link = self.hardware.inter if any(len(node) > 1 for node in nodes) else self.hardware.intra
        size = sum(self._local_bytes(stage, name, layout) for name in stage.sent)
        return link.latency + size / link.bandwidth


def _holding(plan: Plan, held: int) -> Plan:
    """A plan for one micro-batch in flight, as one for several."""
    memory = {key: size * (held if key.category in ("saved", "inside") else 1) for key, size in plan.memory.items()}
    return replace(plan, memory=memory)
