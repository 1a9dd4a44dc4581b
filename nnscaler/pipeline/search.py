"""The search for the best pipeline, or for the plan without one where that is faster.

Every schedule that the devices allow is estimated first (see `nnscaler.pipeline.stages`). At first, all stages have the
same number of pivots; then cut points move towards stages of equal time, as long as that makes the step faster. The
layout of what crosses is chosen once for each mesh of a pipeline rank. Finally, those schedules are planned whose
estimate is faster than the best plan so far, the most promising first.

All this is done with the device's memory alone, and then again with what saves memory at a price, such as the host and
pieces, for those schedules that more memory would make faster. At first, the devices of a rank are one mesh axis. They
are two where that could be faster still, and time is left. Last, where each rank has one stage, ranks may have devices
in unequal numbers: devices move from rank to rank as long as that makes the step faster.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any, NamedTuple

from nnscaler.errors import UserError
from nnscaler.graph import Graph
from nnscaler.hardware import Hardware
from nnscaler.mesh import Mesh, PipelineMesh, devices_text
from nnscaler.mesh import meshes as meshes_of
from nnscaler.pipeline.cut import pivots
from nnscaler.pipeline.plan import PipelinePlan
from nnscaler.pipeline.stages import Candidate, Estimate, StagePlanner
from nnscaler.placement import REPLICATE, Placements
from nnscaler.plan import Plan
from nnscaler.planner import SEARCH_SECONDS, NotFaster, NothingFits, find_plan
from nnscaler.planner.options import layouts_of
from nnscaler.planner.search import SPARING, may_save, nodes_to_recompute
from nnscaler.profiler.operators import OperatorTimes
from nnscaler.schedules import KINDS, UNEVEN, Schedule
from nnscaler.searched import Findings, Searched
from nnscaler.sums import IN_FP32, GradientSum

logger = logging.getLogger(__name__)

_BALANCING_ROUNDS = 3
_MOST_MOVES = 6  # of a device from one rank to another that are tried before one is made


@dataclass(frozen=True)
class Wanted:
    """What the user has decided.

    pivots    classes at whose modules stages may begin; empty: see `nnscaler.pipeline.cut.pivots`
    schedule  the kind of schedule; None: any
    stages    the number of stages; None: any
    alone     whether a plan without a pipeline will do too, unless `schedule` or `stages` says otherwise
    plain     True: only ranks whose devices are one axis, in equal numbers; False: only others; None: both
    """

    pivots: tuple[str, ...] = ()
    schedule: str | None = None
    stages: int | None = None
    alone: bool = True
    plain: bool | None = None


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
    until = (began := time.process_time()) + seconds
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

    def planner(**saving: Any) -> StagePlanner:
        return StagePlanner(
            graph, hardware, memory, recompute_modules, fused, times, begins, until, sums=sums, **saving
        )

    alone, search = planner(), _Search(best, refused, until, below, findings=Findings(began))
    if best is not None:
        search.findings.add(time.process_time(), best.step_seconds)
    free = replace(alone, memory=inf, estimated={}, layouts={})
    sparing = planner(host=host, sparing=True, groups=True, known=alone.known)
    for optional, on in _rounds([one for one in schedules if one is not None], meshes[0], hardware):
        if wanted.plain is optional:
            continue
        search.hurries = below < inf or optional
        if search.hurries:
            on = search.gaining(on, free)
        search.among(on, alone)
        on = search.gaining(on, free)
        if search.best is None or time.process_time() < until:
            search.among(on, sparing)
    if search.best is None and below < inf:
        raise NotFaster(below)
    if search.best is None:
        raise _nothing_fits(unpiped, search.refused)
    stopped = time.process_time() >= until or (best is not None and best.searched is not None and best.searched.stopped)
    search.best.searched = Searched(seconds, stopped, search.findings.found)
    which = search.best.schedule if isinstance(search.best, PipelinePlan) else "no pipeline"
    logger.info("chosen: %s, %.4g s a step%s", which, search.best.step_seconds, may_save(search.best.gap))
    return search.best


class _On(NamedTuple):
    """A schedule that may be planned on a mesh.

    moves  whether devices may move from one rank to another
    """

    schedule: Schedule
    mesh: PipelineMesh
    moves: bool = False

    def __str__(self) -> str:
        sizes = [mesh.sizes for mesh in self.mesh.ranks]
        plain = self.mesh.is_even and len(sizes[0]) == 1
        return str(self.schedule) if plain else f"{self.schedule}, {devices_text(sizes)}"


def _rounds(schedules: Sequence[Schedule], whole: Mesh, hardware: Hardware) -> Iterator[tuple[bool, list[_On]]]:
    """(whether it is left out where time is, what is tried): all devices of a rank as one axis; as two; and with
    devices in unequal numbers. `whole`: a mesh of all devices of a copy"""
    devices, replicas = whole.plan_ngpus, whole.replicas
    even_on: list[_On] = []
    for schedule in schedules:
        each, rest = divmod(devices, schedule.ranks)
        of_rank = meshes_of(each, replicas, hardware.devices_per_node) if not rest else []
        even_on += [_On(schedule, PipelineMesh.of([mesh.sizes] * schedule.ranks, replicas)) for mesh in of_rank]
    for axes in (1, 2):
        yield axes > 1, [on for on in even_on if len(on.mesh.ranks[0].sizes) == axes]
    one_stage = [schedule for schedule in schedules if schedule.kind in UNEVEN and schedule.ranks < devices]
    yield (
        True,
        [
            _On(one, PipelineMesh.of([(size,) for size in halved(devices, one.ranks)], replicas), True)
            for one in one_stage
        ],
    )


def _nothing_fits(unpiped: UserError | None, last: str) -> NothingFits:
    """unpiped: why no plan without a pipeline does, if that was tried; last: which pipeline was tried last, and its
    refusal"""
    tried = f"; the last that was tried, {last}" if last else ""
    refusal = NothingFits(f"{f'{unpiped}; ' if unpiped else ''}no pipeline fits{tried}")
    if isinstance(unpiped, NothingFits):
        refusal.needed = unpiped.needed
    return refusal


@dataclass
class _Search:
    """The search over schedules: the best so far, and why the last that could not be was refused.

    until    by `time.process_time`, when the search ends, if it `hurries`
    below    seconds of a step; only plans that take less are wanted
    hurries  whether that is so though there is no plan, as most has been tried; one thing more is tried all the same
    findings seconds of a step of the best plans so far
    """

    best: Plan | PipelinePlan | None
    refused: str
    until: float = inf
    below: float = inf
    hurries: bool = False
    findings: Findings = field(default_factory=lambda: Findings(time.process_time()))

    def is_over(self) -> bool:
        """Whether time is out, where it counts."""
        return time.process_time() >= self.until and (self.hurries or self._to_beat() < inf)

    def _to_beat(self) -> float:
        return min(self.below, inf if self.best is None else self.best.step_seconds)

    def among(self, on: Sequence[_On], planner: StagePlanner) -> None:
        """Tries schedules on meshes, those first that promise most."""
        estimates = []
        for one, splits in [(each, splits) for each in on for splits in _ways(each.schedule)]:
            if self.is_over() and (self._to_beat() < inf or one is not on[0]):
                break
            try:
                found = _estimated(planner, one, splits)
            except UserError as error:
                self._refuse(one, error)
            else:
                if found is not None:
                    estimates.append(found)
        for place, estimate in enumerate(sorted(estimates, key=lambda one: one.step_seconds)):
            if place and self.best is not None and self.is_over():
                return
            one, below = _On(estimate.candidate.schedule, estimate.candidate.mesh), self._to_beat()
            try:
                with quiet("planner"):
                    plan = planned(planner, estimate, below)
            except UserError as error:
                self._refuse(one, error)
                continue
            if plan is None:
                logger.info("%s: not faster; estimated at %.4g s a step", one, estimate.step_seconds)
                continue
            logger.info("%s: %.4g s a step", one, plan.step_seconds)
            self.best = plan
            self.findings.add(time.process_time(), plan.step_seconds)

    def gaining(self, on: Sequence[_On], free: StagePlanner) -> list[_On]:
        """Those which could be worth what spares memory at a price, or what is tried only where time is left; those
        first that promise most. `free`: has all memory it wants"""
        if self._to_beat() == inf:
            return list(on)
        promised = [(self._promised(one, free), one) for one in on]
        wanted = [pair for pair in promised if pair[0] < self._to_beat() * (1 - SPARING)]
        return [one for _, one in sorted(wanted, key=lambda pair: pair[0])]

    def _promised(self, on: _On, free: StagePlanner) -> float:
        """Seconds of a step, of what has all memory it wants; inf where time is out."""
        found = None if self.is_over() else _estimated(free, on, max(_ways(on.schedule)))
        return inf if found is None else found.step_seconds

    def _refuse(self, on: _On, error: UserError) -> None:
        self.refused = f"{on}: {error}"
        logger.info("%s", self.refused)


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
    for ranks in range(2, devices + 1):
        for kind, per_rank in ((name, count) for name in kinds for count in KINDS[name].stages_per_rank):
            stages = ranks * per_rank
            if stages > places or (devices % ranks and kind not in UNEVEN):
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


def _estimated(planner: StagePlanner, on: _On, splits: bool) -> Estimate | None:
    """The estimate of what is to be tried; None where devices do not move, though they may. Raises UserError where it
    does not fit."""
    if not on.moves:
        return estimated(planner, on.schedule, on.mesh, splits)
    found = with_devices_moved(planner, on.schedule, on.mesh)
    return None if found.candidate.mesh.is_even else found


def estimated(planner: StagePlanner, schedule: Schedule, mesh: PipelineMesh, splits: bool = False) -> Estimate:
    """The estimate of a schedule with its best cut points; `splits` as in `Candidate`. Raises UserError where it does
    not fit."""
    counts = even(len(planner.begins), schedule.stages)
    if mesh not in planner.layouts:
        planner.layouts[mesh] = _best_layout(planner, schedule, counts, mesh)
    best = planner.estimate(Candidate(schedule, counts, planner.layouts[mesh], mesh, splits))
    for _ in range(_BALANCING_ROUNDS):
        counts = balanced(best.candidate.counts, [each.seconds for each in best.needs])
        if counts == best.candidate.counts:
            break
        try:
            moved = planner.estimate(replace(best.candidate, counts=counts))
        except UserError:
            break
        if moved.step_seconds >= best.step_seconds:
            break
        best = moved
    return best


def with_devices_moved(planner: StagePlanner, schedule: Schedule, mesh: PipelineMesh) -> Estimate:
    """The estimate of a schedule of one stage a rank, on as many devices as `mesh` has in all, of which each rank gets
    as many as is fastest: they move one by one, as long as that makes the step faster and there is time.

    Raises UserError where nothing fits that was tried.
    """
    best, failure = None, None
    tried: set[PipelineMesh] = set()
    trying = [mesh]
    while trying:
        mesh, *trying = trying
        tried.add(mesh)
        try:
            found = estimated(planner, schedule, mesh)
        except UserError as error:
            failure = error
            if best is None and not trying:
                trying = [one for one in moves(mesh, [0.0] * schedule.ranks) if one not in tried]
        else:
            if best is None or found.step_seconds < best.step_seconds:
                best = found
                trying = [one for one in moves(mesh, [each.seconds for each in best.needs]) if one not in tried]
        if time.process_time() >= planner.until and (best is not None or len(tried) > _MOST_MOVES):
            break
    if best is None:
        assert failure is not None
        raise failure
    return best


def moves(mesh: PipelineMesh, seconds: Sequence[float]) -> list[PipelineMesh]:
    """The meshes on which one rank has given a device to another, or has exchanged its devices for fewer; a few, those
    first where the slowest takes from the fastest. `seconds`: of each rank's stage"""
    sizes = [each.plan_ngpus for each in mesh.ranks]
    ranks = range(len(sizes))
    pairs = [(taker, giver) for taker in ranks for giver in ranks if giver != taker and sizes[giver] > 1]
    found: dict[tuple[int, ...], None] = {}
    for taker, giver in sorted(pairs, key=lambda pair: seconds[pair[1]] - seconds[pair[0]]):
        for count in sorted({1, max(1, sizes[giver] - sizes[taker])}):
            found[tuple(size + count * ((rank == taker) - (rank == giver)) for rank, size in enumerate(sizes))] = None
    return [PipelineMesh.of([(size,) for size in after], mesh.replicas) for after in list(found)[:_MOST_MOVES]]


def _best_layout(planner: StagePlanner, schedule: Schedule, counts: tuple[int, ...], mesh: PipelineMesh) -> Placements:
    """The layout of what crosses between stages with which the estimated step is fastest, of those for which there is
    time. It is one that the devices of some rank allow."""
    first = planner.cut(counts)[0]
    shape = first.graph.root.tensors[first.sent[0]].shape
    layouts = dict.fromkeys(layout for each in mesh.ranks for layout in layouts_of(shape, each, REPLICATE))
    if len(layouts) == 1:
        return next(iter(layouts))
    seconds: dict[Placements, float] = {}
    failure: UserError | None = None
    for layout in layouts:
        if seconds and time.process_time() >= planner.until:
            break
        try:
            seconds[layout] = planner.estimate(Candidate(schedule, counts, layout, mesh)).step_seconds
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


def halved(devices: int, ranks: int) -> tuple[int, ...]:
    """How many devices each rank gets at first: the most are halved until there are as many numbers as ranks."""
    found = [devices]
    while len(found) < ranks:
        at = found.index(max(found))
        found[at : at + 1] = [found[at] - found[at] // 2, found[at] // 2]
    return tuple(found)


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
