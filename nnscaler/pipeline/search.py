"""The search for the best pipeline, or for the plan without one where that is faster.

Every schedule that the devices allow is estimated first (see `nnscaler.pipeline.stages`). At first, all stages have the
same number of pivots; then cut points move towards stages of equal time, as long as that makes the step faster. The
layout of what crosses is chosen once for each mesh of a pipeline rank. Finally, those schedules are planned whose
estimate is faster than the best plan so far, the most promising first.

All this is done with the device's memory alone, and then again with what saves memory at a price, such as the host and
pieces, for those schedules that more memory would make faster. At first, the devices of a rank are one mesh axis. They
are two where that could be faster still, and time is left.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import inf
from typing import Any, NamedTuple

from nnscaler.errors import UserError
from nnscaler.graph import Graph
from nnscaler.hardware import Hardware
from nnscaler.mesh import Mesh, axis_text
from nnscaler.mesh import meshes as meshes_of
from nnscaler.pipeline.cut import pivots
from nnscaler.pipeline.plan import PipelinePlan
from nnscaler.pipeline.stages import Candidate, Estimate, StagePlanner
from nnscaler.placement import REPLICATE, Placements
from nnscaler.plan import Plan
from nnscaler.planner import SEARCH_SECONDS, NotFaster, NothingFits, find_plan
from nnscaler.planner.options import layouts_of
from nnscaler.planner.search import SPARING, nodes_to_recompute
from nnscaler.profiler.operators import OperatorTimes
from nnscaler.schedules import KINDS, Schedule
from nnscaler.sums import IN_FP32, GradientSum

logger = logging.getLogger(__name__)

_BALANCING_ROUNDS = 3


@dataclass(frozen=True)
class Wanted:
    """What the user has decided.

    pivots    classes at whose modules stages may begin; empty: see `nnscaler.pipeline.cut.pivots`
    schedule  the kind of schedule; None: any
    stages    the number of stages; None: any
    alone     whether a plan without a pipeline will do too, unless `schedule` or `stages` says otherwise
    """

    pivots: tuple[str, ...] = ()
    schedule: str | None = None
    stages: int | None = None
    alone: bool = True


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
    sums: GradientSum = IN_FP32,
    seconds: float = SEARCH_SECONDS,
    host: float = 0.0,
    below: float = inf,
) -> Plan | PipelinePlan:
    """The plan of least predicted step time, with or without a pipeline.

    meshes  those that are tried without a pipeline
    wanted  what the user has decided
    host    bytes a device of the host's memory, which the stages of a device may use together
    below   seconds of a step; only a plan that takes less is wanted
    others  as for `nnscaler.planner.find_plan`

    Raises UserError where nothing fits, and where there is no pipeline as the user wants it; NotFaster where none takes
    less than `below`.
    """
    memory = 0.9 * hardware.memory if memory is None else memory
    until = time.process_time() + seconds
    nodes_to_recompute(graph, recompute_modules or ())  # all are known, though not to every stage
    schedules = candidates(wanted, meshes[0].plan_ngpus, len(begins := pivots(graph, wanted.pivots)), micro_batches)
    best: Plan | PipelinePlan | None = None
    refused, unpiped = "", None
    if None in schedules:
        try:
            with quiet("planner"):
                best = find_plan(
                    graph, meshes, hardware, memory=memory, recompute_modules=recompute_modules,
                    micro_batches=micro_batches, fused=fused, times=times, sums=sums, seconds=seconds / 2, host=host,
                    below=below,
                )  # fmt: skip
            logger.info("without a pipeline: %.4g s a step", best.step_seconds)
        except NotFaster as slower:
            logger.info("without a pipeline: at least %.4g s a step", slower.bound)
        except UserError as error:
            refused, unpiped = f"without a pipeline: {error}", error
            logger.info("%s", refused)

    def planners(on: Sequence[_On], **saving: Any) -> dict[Mesh, StagePlanner]:
        return {
            mesh: StagePlanner(
                graph, mesh, hardware, memory, recompute_modules, fused, times, begins, until, sums=sums, **saving
            )
            for _, mesh in on
        }

    search = _Search(best, refused, until, below)
    for axes in (1, 2):
        on = [
            _On(schedule, mesh)
            for schedule in schedules
            if schedule is not None
            for mesh in _meshes_of_a_rank(schedule, meshes[0], hardware)
            if len(mesh.sizes) == axes
        ]
        search.hurries = below < inf or (axes > 1 and search.best is not None)
        alone = planners(on)
        free = {mesh: replace(planner, memory=inf, estimated={}) for mesh, planner in alone.items()}
        if search.hurries:
            on = search.gaining(on, free)
        search.among(on, alone)
        on = search.gaining(on, free)
        if search.best is None or time.process_time() < until:
            search.among(on, planners(on, host=host, sparing=True, groups=True))
    if search.best is None and below < inf:
        raise NotFaster(below)
    if search.best is None:
        raise _nothing_fits(unpiped, search.refused)
    return search.best


class _On(NamedTuple):
    """A schedule that may be planned on a mesh for each of its ranks."""

    schedule: Schedule
    mesh: Mesh


def _meshes_of_a_rank(schedule: Schedule, whole: Mesh, hardware: Hardware) -> list[Mesh]:
    """The meshes to try for each pipeline rank. `whole`: a mesh of all devices of a copy"""
    return meshes_of(whole.plan_ngpus // schedule.ranks, whole.replicas, hardware.devices_per_node)


def _nothing_fits(unpiped: UserError | None, last: str) -> NothingFits:
    """unpiped: why no plan without a pipeline does, if that was tried; last: which pipeline was tried last, and its
    refusal"""
    refusal = NothingFits(f"{f'{unpiped}; ' if unpiped else ''}no pipeline fits; the last that was tried, {last}")
    if isinstance(unpiped, NothingFits):
        refusal.needed = unpiped.needed
    return refusal


@dataclass
class _Search:
    """The search over schedules: the best so far, and why the last that could not be was refused.

    until    by `time.process_time`, when the search ends, if it `hurries`
    below    seconds of a step; only plans that take less are wanted
    hurries  whether there is a plan already: the best so far, or one of other devices or micro-batches
    """

    best: Plan | PipelinePlan | None
    refused: str
    until: float = inf
    below: float = inf
    hurries: bool = False

    def is_over(self) -> bool:
        """Whether time is out, where there is a plan already."""
        return self.hurries and time.process_time() >= self.until

    def _to_beat(self) -> float:
        return min(self.below, inf if self.best is None else self.best.step_seconds)

    def among(self, on: Sequence[_On], planners: Mapping[Mesh, StagePlanner]) -> None:
        """Tries schedules on meshes, each of which has a planner, those first that promise most."""
        estimates = []
        for schedule, mesh, splits in [(*one, splits) for one in on for splits in _ways(one[0])]:
            if self.is_over():
                return
            try:
                estimates.append((estimated(planners[mesh], schedule, splits), mesh))
            except UserError as error:
                self._refuse(schedule, mesh, error)
        for estimate, mesh in sorted(estimates, key=lambda one: one[0].step_seconds):
            schedule = estimate.candidate.schedule
            below = self._to_beat()
            try:
                with quiet("planner"):
                    found = planned(planners[mesh], estimate, below)
            except UserError as error:
                self._refuse(schedule, mesh, error)
                continue
            if found is None:
                logger.info("%s: not faster; estimated at %.4g s a step", _name(schedule, mesh), estimate.step_seconds)
                continue
            logger.info("%s: %.4g s a step", _name(schedule, mesh), found.step_seconds)
            self.best = found

    def gaining(self, on: Sequence[_On], free: Mapping[Mesh, StagePlanner]) -> list[_On]:
        """Those which could be worth what spares memory at a price, or a second axis. `free`: have all memory they
        want"""
        return [one for one in on if self._may_gain(one.schedule, free[one.mesh])]

    def _may_gain(self, schedule: Schedule, free: StagePlanner) -> bool:
        if self._to_beat() == inf:
            return True
        if self.is_over():
            return False
        return estimated(free, schedule, max(_ways(schedule))).step_seconds < self._to_beat() * (1 - SPARING)

    def _refuse(self, schedule: Schedule, mesh: Mesh, error: UserError) -> None:
        self.refused = f"{_name(schedule, mesh)}: {error}"
        logger.info("%s", self.refused)


def _name(schedule: Schedule, mesh: Mesh) -> str:
    """What is tried, for people."""
    axes = "" if len(mesh.sizes) == 1 else f", each {' x '.join(map(axis_text, mesh.sizes, mesh.names))}"
    return f"{schedule}{axes}"


def _ways(schedule: Schedule) -> tuple[bool, ...]:
    """Whether stages are to run backward in two parts: without is tried too, since it takes less memory."""
    return (True, False) if KINDS[schedule.kind].splits else (False,)


def candidates(wanted: Wanted, devices: int, places: int, micro_batches: int) -> list[Schedule | None]:
    """The schedules to try on so many devices; None among them: no pipeline.

    places  how many places there are at which a stage may begin
    Raises UserError, with the reason, where no schedule is as the user wants it.
    """
    kinds = [wanted.schedule] if wanted.schedule is not None else list(KINDS)
    without = wanted.alone and wanted.schedule is None and wanted.stages in (None, 1)
    found: list[Schedule | None] = [None] if without else []
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


def estimated(planner: StagePlanner, schedule: Schedule, splits: bool = False) -> Estimate:
    """The estimate of a schedule with its best cut points; `splits` as in `Candidate`. Raises UserError where it does
    not fit."""
    counts = even(len(planner.begins), schedule.stages)
    if planner.layout is None:
        planner.layout = _best_layout(planner, schedule, counts)
    best = planner.estimate(Candidate(schedule, counts, planner.layout, splits))
    for _ in range(_BALANCING_ROUNDS):
        counts = balanced(best.candidate.counts, [each.seconds for each in best.needs])
        try:
            moved = planner.estimate(replace(best.candidate, counts=counts))
        except UserError:
            break
        if moved.step_seconds >= best.step_seconds:
            break
        best = moved
    return best


def _best_layout(planner: StagePlanner, schedule: Schedule, counts: tuple[int, ...]) -> Placements:
    """The layout of what crosses between stages with which the estimated step is fastest, of those for which there is
    time."""
    whole = (REPLICATE,) * len(planner.mesh.sizes)
    if planner.mesh.plan_ngpus == 1:
        return whole
    first = planner.cut(counts)[0]
    layouts = layouts_of(first.graph.root.tensors[first.sent[0]].shape, planner.mesh, REPLICATE)
    seconds: dict[Placements, float] = {}
    failure: UserError | None = None
    for layout in layouts:
        if seconds and time.process_time() >= planner.until:
            break
        try:
            seconds[layout] = planner.estimate(Candidate(schedule, counts, layout)).step_seconds
        except UserError as error:
            failure = error
    if not seconds:
        assert failure is not None
        raise failure
    return min(seconds, key=seconds.__getitem__)


def planned(planner: StagePlanner, estimate: Estimate, below: float) -> PipelinePlan | None:
    """The plan of an estimated candidate. Its cut points may still move, by the times of the planned stages.

    None where its step does not take less than `below` seconds. Raises UserError where it does not fit.
    """
    plan = None
    for _ in range(_BALANCING_ROUNDS):
        found = planner.plan(estimate, below) if estimate.step_seconds < below else None
        if found is None:
            break
        plan, below = found, found.step_seconds
        counts = balanced(estimate.candidate.counts, [sum(stage.seconds.values()) for stage in found.stages])
        if counts == estimate.candidate.counts:
            break
        try:
            estimate = planner.estimate(replace(estimate.candidate, counts=counts))
        except UserError:
            break
    return plan


def even(places: int, stages: int) -> tuple[int, ...]:
    """How many of `places` each stage gets: numbers that differ by one at most. The last stages get fewer, as they
    have the loss."""
    return tuple(places // stages + (stage < places % stages) for stage in range(stages))


def balanced(counts: Sequence[int], seconds: Sequence[float]) -> tuple[int, ...]:
    """The same number of places in all, divided so that the slowest stage is as fast as possible.

    seconds  of a micro-batch in each stage, with `counts` places

    A stage's time is taken to be linear in its places, at the rate of the fastest stage in the middle. With two stages,
    the difference between them is taken not to depend on their places.
    """
    inner = range(1, len(counts) - 1) or range(len(counts))
    rate = min(seconds[i] / counts[i] for i in inner)
    fixed = [max(0.0, total - rate * count) for total, count in zip(seconds, counts)]
    found = [1] * len(counts)
    for _ in range(sum(counts) - len(counts)):
        after = [fixed[i] + rate * (found[i] + 1) for i in range(len(counts))]
        found[after.index(min(after))] += 1
    return tuple(found)


@contextmanager
def quiet(*rooms: str) -> Iterator[None]:
    """Inside, these parts of the package log only warnings: they would write a line about everything that is tried."""
    loggers = [logging.getLogger(f"nnscaler.{room}") for room in rooms]
    before = [one.level for one in loggers]
    for one in loggers:
        one.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for one, level in zip(loggers, before):
            one.setLevel(level)
