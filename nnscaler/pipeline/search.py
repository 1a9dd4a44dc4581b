"""graph + devices + hardware -> the best pipeline, or the plan without one where that is better.

Number of stages, schedule, layout of what crosses between stages and cut points are tried in turn; each time the
planner plans every distinct stage with the memory that its rank has for it and the micro-batches that the schedule
keeps in flight, and the schedule's actions are simulated with the stages' times. Cut points begin at equal numbers of
pivots a stage, and move towards equal times as long as that helps.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from nnscaler.errors import UserError
from nnscaler.graph import Graph
from nnscaler.hardware import Hardware
from nnscaler.mesh import Mesh
from nnscaler.pipeline.cut import pivots
from nnscaler.pipeline.plan import PipelinePlan, update_seconds
from nnscaler.pipeline.schedules import KINDS, Schedule
from nnscaler.pipeline.stages import Candidate, StagePlanner
from nnscaler.placement import REPLICATE, Placements
from nnscaler.plan import Plan
from nnscaler.planner import find_plan
from nnscaler.planner.options import layouts_of
from nnscaler.profiler.operators import OperatorTimes

logger = logging.getLogger(__name__)

_BALANCING_ROUNDS = 3


@dataclass(frozen=True)
class Wanted:
    """What the user fixes: classes at whose modules stages may begin, the schedule, the number of stages."""

    pivots: tuple[str, ...] = ()
    schedule: str | None = None
    stages: int | None = None


def find_pipeline(
    graph: Graph,
    meshes: Sequence[Mesh],
    hardware: Hardware,
    wanted: Wanted,
    *,
    memory: float | None = None,
    recompute_modules: Sequence[str] | None = None,
    micro_batches: int = 1,
    fused: bool = False,
    times: OperatorTimes | None = None,
) -> Plan | PipelinePlan:
    """The plan of least predicted step time over the devices of `meshes`; other arguments as for `find_plan`.

    The devices of a pipeline rank are one mesh axis; the meshes given are those tried without a pipeline.

    Raises UserError where nothing fits, and for what cannot be done as wanted.
    """
    memory = 0.9 * hardware.memory if memory is None else memory
    begins = pivots(graph, wanted.pivots)
    planners: dict[int, StagePlanner] = {}
    best: Plan | PipelinePlan | None = None
    best_candidate: Candidate | None = None
    refused = ""
    for schedule in candidates(wanted, meshes[0].plan_ngpus, len(begins), micro_batches):
        name = "without a pipeline" if schedule is None else str(schedule)
        below = float("inf") if best is None else best.step_seconds
        candidate: Candidate | None = None
        try:
            with _quiet_planner():
                if schedule is None:
                    found: Plan | PipelinePlan = find_plan(
                        graph, meshes, hardware, memory=memory, recompute_modules=recompute_modules,
                        micro_batches=micro_batches, fused=fused, times=times,
                    )  # fmt: skip
                else:
                    of_rank = Mesh((meshes[0].plan_ngpus // schedule.ranks,), meshes[0].replicas)
                    planner = StagePlanner(graph, of_rank, hardware, memory, recompute_modules, fused, times, begins)
                    planner = planners.setdefault(schedule.ranks, planner)
                    candidate, found = plan_schedule(planner, schedule, below)
        except UserError as error:
            refused = f"{name}: {error}"
            logger.info("%s", refused)
            continue
        if found.step_seconds >= below:
            logger.info("%s: not faster", name)
            continue
        logger.info("%s: %.4g s a step", name, found.step_seconds)
        best, best_candidate = found, candidate
    if best is None:
        raise UserError(f"no pipeline fits; the last that was tried, {refused}")
    if best_candidate is None:
        return best
    with _quiet_planner():
        return planners[best_candidate.schedule.ranks].plan(best_candidate, exact=True)


def candidates(wanted: Wanted, devices: int, places: int, micro_batches: int) -> list[Schedule | None]:
    """Schedules to try on `devices` devices for a graph with `places` at which stages may begin; None: no pipeline.

    Raises UserError where none is as wanted, with the reason.
    """
    kinds = [wanted.schedule] if wanted.schedule is not None else list(KINDS)
    found: list[Schedule | None] = [None] if wanted.schedule is None and wanted.stages in (None, 1) else []
    refused: list[str] = []
    possible = {1} if wanted.schedule is None else set()
    for ranks in (ranks for ranks in range(2, devices + 1) if devices % ranks == 0):
        for kind, per_rank in ((name, count) for name in kinds for count in KINDS[name].stages_per_rank):
            stages = ranks * per_rank
            if stages > places:
                continue
            possible.add(stages)
            if wanted.stages in (None, stages):
                try:
                    found.append(Schedule(kind, ranks, stages, micro_batches))
                except UserError as error:
                    refused.append(str(error))
    if found:
        return found
    if refused:
        raise UserError(refused[0])
    given = f"pipeline_nstages is {wanted.stages}" if wanted.stages else f"pipeline_schedule is '{wanted.schedule}'"
    allowed = ", ".join(map(str, sorted(possible))) or "no number of"
    raise UserError(
        f"{given}, but plan_ngpus={devices} and {places} places at which stages can begin allow {allowed} stages"
        + (f" with {wanted.schedule}" if wanted.stages and wanted.schedule else "")
    )


def plan_schedule(planner: StagePlanner, schedule: Schedule, below: float) -> tuple[Candidate, PipelinePlan]:
    """The best candidate for a schedule, and its plan: over layouts of what crosses, then over cut points.

    Where it cannot take less than `below` seconds a step, the plan is a bound only. Raises UserError where none fits.
    """
    counts = even(len(planner.begins), schedule.stages)
    first = planner.cut(counts)[0]
    shape = first.graph.root.tensors[first.sent[0]].shape
    whole: list[Placements] = [(REPLICATE,) * len(planner.mesh.sizes)]
    layouts = layouts_of(shape, planner.mesh, REPLICATE) if planner.mesh.plan_ngpus > 1 else whole
    bounds: list[tuple[Candidate, PipelinePlan]] = []
    failure: UserError | None = None
    for layout in layouts:
        candidate = Candidate(schedule, counts, layout)
        try:
            bounds.append((candidate, planner.bound(candidate)))
        except UserError as error:
            failure = failure or error
    if not bounds:
        assert failure is not None
        raise failure
    best, plan = min(bounds, key=lambda pair: pair[1].step_seconds)
    if plan.step_seconds >= below:
        return best, plan
    plan = planner.plan(best)
    for _ in range(_BALANCING_ROUNDS):
        moved = Candidate(schedule, balanced(best.counts, plan.stages), best.layout)
        try:
            if planner.bound(moved).step_seconds >= plan.step_seconds:
                break
            found = planner.plan(moved)
        except UserError:
            break
        if found.step_seconds >= plan.step_seconds:
            break
        best, plan = moved, found
    return best, plan


def even(places: int, stages: int) -> tuple[int, ...]:
    """So many places for each stage that they differ by one at most; the last have fewer, as they have the loss."""
    return tuple(places // stages + (stage < places % stages) for stage in range(stages))


def balanced(counts: Sequence[int], plans: Sequence[Plan]) -> tuple[int, ...]:
    """As many places in all, but so that the slowest stage is as fast as it can be.

    What a stage takes is supposed to be linear in its places, at the rate of the stages in the middle (or, of two
    stages, as if the difference between them did not depend on their places).
    """
    seconds = [sum(plan.seconds.values()) - update_seconds(plan) for plan in plans]
    inner = range(1, len(counts) - 1) or range(len(counts))
    rate = min(seconds[i] / counts[i] for i in inner)
    fixed = [max(0.0, total - rate * count) for total, count in zip(seconds, counts)]
    found = [1] * len(counts)
    for _ in range(sum(counts) - len(counts)):
        after = [fixed[i] + rate * (found[i] + 1) for i in range(len(counts))]
        found[after.index(min(after))] += 1
    return tuple(found)


@contextmanager
def _quiet_planner() -> Iterator[None]:
    """Without the planner's line about every stage that is tried."""
    planner = logging.getLogger("nnscaler.planner")
    before = planner.level
    planner.setLevel(logging.WARNING)
    try:
        yield
    finally:
        planner.setLevel(before)
