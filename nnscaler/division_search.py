"""The search over ways to divide the sequences of a step, each of which is planned: the fastest, and why others lost.

1. Of each division, a lower bound of its step is found: that of its program on one mesh axis (where none fits on it, on
   the first two on which one does), within memory, where choices may be made in parts. It takes about a second, and
   most bounds are within 2 % of the plan.
2. Divisions are planned there, those with the lowest bounds first, as long as a bound is near the fastest plan.
3. They are planned on other meshes, and then as pipelines, where that could be faster still and time is left: at first
   with ranks that have devices in equal numbers, on one axis each, and then with others.

The model is traced once for each size of micro-batch: sizes are constants of a graph.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import inf

from nnscaler.batch import Batch, Division, divisors
from nnscaler.config import ComputeConfig
from nnscaler.counting import counted
from nnscaler.errors import UserError
from nnscaler.graph import Graph
from nnscaler.hardware import Hardware
from nnscaler.mesh import Mesh
from nnscaler.pipeline.search import quiet
from nnscaler.planner import NotFaster, NothingFits
from nnscaler.planner.search import may_save
from nnscaler.planning import AnyPlan, bound_for, plan_for, plan_or_advise, traced
from nnscaler.profiler.operators import OperatorTimes
from nnscaler.searched import Findings, Searched
from nnscaler.source import Source

logger = logging.getLogger(__name__)

SEARCHES = 3  # the whole search may take as long as so many searches for one plan
WORTH = 5e-3  # part of a step's time that more devices a copy, larger micro-batches, or a pipeline must save
NEAR = 2e-2  # divisions are planned whose bound is so near to the fastest
LEAST_SECONDS = 5.0  # for a plan, though time is out


@dataclass
class Tried:
    """A division that was considered.

    pipeline whether plans with a pipeline were looked for, or those without
    meshes   on which those without may be
    bounds   mesh -> seconds of a step; no plan on it takes less. inf: none fits. Of meshes that were looked at
    plan     the fastest that was found; None: it was not planned, or what was found was not faster than others
    needed   bytes a device of the plan that needs least, where none fits
    refusal  why it cannot be planned, where it is not for memory
    """

    division: Division
    pipeline: bool = False
    meshes: Sequence[Mesh] = ()
    bounds: dict[Mesh, float] = field(default_factory=dict)
    plan: AnyPlan | None = None
    needed: float | None = None
    refusal: str = ""

    @property
    def name(self) -> str:
        """What it is, for people."""
        return f"{self.division}{', as a pipeline' if self.pipeline else ''}"

    @property
    def bound(self) -> float:
        """Seconds of a step; no plan on the meshes that were looked at takes less. inf: none fits; 0: none was."""
        return min(self.bounds.values(), default=0.0)

    @property
    def left(self) -> list[Mesh]:
        """The meshes that were not looked at."""
        return [mesh for mesh in self.meshes if mesh not in self.bounds]

    def prove(self, meshes: Sequence[Mesh], bound: float) -> None:
        """Notes that no plan on some meshes, without a pipeline, takes less."""
        if self.pipeline:
            return
        self.bounds.update({mesh: max(bound, self.bounds.get(mesh, 0.0)) for mesh in meshes})
        if bound < inf:
            self.refusal, self.needed = "", None

    @property
    def step_seconds(self) -> float:
        """Predicted seconds of a step; inf where there is no plan."""
        return inf if self.plan is None else self.plan.step_seconds

    @property
    def at_least(self) -> float:
        """Seconds that a step takes, or where there is no plan, takes at least; inf where nothing is known."""
        return self.step_seconds if self.plan else self.bound or inf


@dataclass(frozen=True)
class Divided:
    """The fastest division.

    source, config  what was compiled in it
    tried           all that were considered, the fastest first
    """

    source: Source
    config: ComputeConfig
    graph: Graph
    plan: AnyPlan
    tried: list[Tried]


def in_division(source: Source, config: ComputeConfig, division: Division) -> tuple[Source, ComputeConfig]:
    """What is compiled, and for what, in a division. `source`: with micro-batches of any size"""
    config = replace(config, plan_ngpus=division.plan_ngpus, micro_batches=division.micro_batches)
    return source.with_sequences(division.micro_batch_size), config


def divide(
    batch: Batch, source: Source, config: ComputeConfig, hardware: Hardware, times: OperatorTimes | None
) -> Divided:
    """The division of least predicted step time, among those that the batch allows.

    source  with micro-batches of any size
    config  whose plan_ngpus and micro_batches do not count; with explore_pipeline, pipelines are tried too

    Of divisions whose times differ by less than WORTH, the simplest is taken: the one without a pipeline, with the
    fewest devices a copy, and with the smallest micro-batches.

    Raises UserError where there is no plan.
    """
    search = _Search(batch, source, config, hardware, times)
    divisions = len(search.tried)
    logger.info(
        "looking for the fastest of %s to divide %s among %s; that takes at most about %.0f s",
        counted(divisions, "way"), counted(batch.sequences, "sequence"), counted(batch.runtime_ngpus, "device"),
        search.left(),
    )  # fmt: skip
    with quiet("planner", "pipeline", "planning"):
        search.run()
    best = search.best()
    if best is None:
        best = search.closest()
        one, alone = in_division(source, config, best.division)
        best.plan = plan_or_advise(one, search.graph(best.division), alone, hardware, times)
    elif not best.pipeline:
        search.certify(best)
    chosen = best.division
    tried = sorted(search.tried, key=lambda one: (one is not best, one.plan is None, one.at_least, one.division))
    source, config = in_division(source, config, chosen)
    assert best.plan is not None
    own = best.plan.searched
    best.plan.searched = search.searched(own is not None and own.stopped)
    step = f"{best.step_seconds:.4g} s a step{may_save(best.plan.gap)}"
    logger.info("chosen: %s, %s%s", best.name, step, _next_to(best, tried))
    return Divided(source, config, search.graph(chosen), best.plan, tried)


def _next_to(best: Tried, tried: Sequence[Tried]) -> str:
    """What comes next, in words; nothing where nothing else was planned."""
    runner_up = next((one for one in tried if one.plan and one is not best), None)
    if runner_up is None:
        return ""
    little = f", which is less than {100 * WORTH:.1f} % faster" if runner_up.step_seconds < best.step_seconds else ""
    return f"; next comes {runner_up.name}, {runner_up.step_seconds:.4g} s{little}"


@dataclass
class _Search:
    """The search, which ends when `_now()` is `until`, or else when there is a plan.

    tried     the divisions, in order
    graphs    size of micro-batch -> the model's graph
    findings  seconds of a step of the best plans so far
    """

    batch: Batch
    source: Source
    config: ComputeConfig
    hardware: Hardware
    times: OperatorTimes | None
    until: float = 0.0
    tried: list[Tried] = field(default_factory=list)
    graphs: dict[int, Graph] = field(default_factory=dict)
    findings: Findings = field(init=False)

    def __post_init__(self) -> None:
        self.findings = Findings(self._now())
        self.until = self.findings.began + SEARCHES * self.config.search_seconds
        self.tried = [Tried(division, meshes=self._meshes(division)) for division in self.batch.divisions()]

    @property
    def pipelines(self) -> bool:
        """Whether plans with a pipeline will do."""
        return self.config.explore_pipeline and self.config.pipeline_nstages != 1

    @property
    def alone(self) -> bool:
        """Whether plans without a pipeline will do."""
        return self.config.pipeline_schedule is None and self.config.pipeline_nstages in (None, 1)

    def run(self) -> None:
        """Tries all of them, as far as time allows."""
        self._find_bounds()
        if self.alone:
            self._plan_on_one_axis()
            self._plan_on_more_axes()
        if self.pipelines:
            self._plan_pipelines()

    def graph(self, division: Division) -> Graph:
        """The graph of the model, for the division's micro-batches."""
        size = division.micro_batch_size
        if size not in self.graphs:
            self.graphs[size] = traced(self.source.with_sequences(size), self.config.trace_strategy)
        return self.graphs[size]

    def best(self) -> Tried | None:
        """The simplest of those that are as good as the fastest."""
        fastest = self._fastest()
        near = [one for one in self.tried if one.step_seconds <= fastest * (1 + WORTH) and one.plan is not None]
        return min(near, key=lambda one: (one.pipeline, one.division), default=None)

    def closest(self) -> Tried:
        """Where there is no plan: what needs least memory. Where memory was enough, the smallest micro-batches of the
        largest copies, of which most is allowed."""
        full = [one for one in self.tried if one.needed is not None]
        if full:
            return min(full, key=lambda one: (one.needed, one.division))
        return min(self.tried, key=lambda one: (-one.division.plan_ngpus, one.division.micro_batch_size))

    def certify(self, one: Tried) -> None:
        """Makes the bound of a division's plan one of all its meshes."""
        for mesh in one.left:
            self._bound(one, mesh)
        assert one.plan is not None
        one.plan.bound = one.bound

    def _fastest(self) -> float:
        return min(one.step_seconds for one in self.tried)

    def searched(self, stopped: bool) -> Searched:
        """How all of them were searched for. `stopped`: whether its limit ended the search for the one that is taken"""
        return Searched(SEARCHES * self.config.search_seconds, stopped or self.left() <= 0, self.findings.found)

    def left(self) -> float:
        """Seconds until the search is to end."""
        return self.until - self._now()

    def _now(self) -> float:
        """Processor seconds of this process, without those of timing operators, which is done once for a device."""
        return time.process_time() - (self.times.spent if self.times else 0.0)

    def _bound(self, one: Tried, mesh: Mesh) -> UserError | None:
        """Finds the bound of a division on a mesh. Returns why there is no plan, where that is so."""
        _, config = in_division(self.source, self.config, one.division)
        try:
            found = bound_for(self.graph(one.division), config, self.hardware, self.times, mesh)
        except UserError as refusal:
            one.prove([mesh], inf)
            return refusal
        logger.debug("%s on %s: at least %.4g s a step", one.division, mesh, found)
        one.prove([mesh], found)
        return None

    def _find_bounds(self) -> None:
        """On the first mesh on which a plan may fit. Where few sequences fit on none, more are not asked for."""
        full: dict[int, Tried] = {}
        for one in self.tried:
            split = one.division.plan_ngpus
            if split in full:
                one.needed = full[split].needed
                one.prove(one.meshes, inf)
                continue
            if self.left() < 0 and any(0 < other.bound < inf for other in self.tried):
                continue
            refusals: list[UserError] = []
            for mesh in one.meshes:
                refusal = self._bound(one, mesh)
                if refusal is None:
                    break
                refusals.append(refusal)
            else:
                unfit = [refusal for refusal in refusals if isinstance(refusal, NothingFits)]
                one.needed = min((refusal.needed for refusal in unfit if refusal.needed is not None), default=None)
                one.refusal = next((str(refusal) for refusal in refusals if refusal not in unfit), "")
                if unfit == refusals:
                    full[split] = one

    def _plan_on_one_axis(self) -> None:
        """Plans those whose bounds are near the fastest plan, as their own plans may be too."""
        possible = [one for one in self.tried if 0 < one.bound < inf]
        for one in sorted(possible, key=lambda one: (one.bound, one.division)):
            if one.bound > self._fastest() * (1 + NEAR) or self._is_over(0.0):
                return
            self._plan(one, [mesh for mesh, bound in one.bounds.items() if bound < inf])

    def _plan_on_more_axes(self) -> None:
        """Half of the time that is left is for pipelines, where these will do."""
        possible = [one for one in self.tried if one.bounds and one.left]
        reserved = self.left() / 2 if self.pipelines else 0.0
        for one in sorted(possible, key=lambda one: (one.bound, one.division)):
            if self._is_over(reserved):
                return
            self._plan(one, one.left, self._fastest() * (1 - WORTH))

    def _plan_pipelines(self) -> None:
        """Those first whose stages would be on as many devices as do well with micro-batches of their size."""
        possible = [one for one in self.tried if one.division.plan_ngpus > 1 and one.division.micro_batches > 1]
        pipelines: list[Tried] = []
        for one in sorted(possible, key=lambda one: (self._as_pipeline(one.division), one.division)):
            if self._is_over(0.0):
                return
            pipelines.append(Tried(one.division, pipeline=True))
            self.tried.append(pipelines[-1])
            self._plan(pipelines[-1], one.meshes, self._fastest() * (1 - WORTH))
        for one in pipelines:
            if self._is_over(0.0):
                return
            self._plan(one, self._meshes(one.division), self._fastest() * (1 - WORTH), plain=False)

    def _as_pipeline(self, division: Division) -> float:
        """About how many seconds a step would take as a pipeline: those of the division whose copies are as large as a
        stage, and the time in which a rank has no micro-batch yet, or none any more. Where copies as large are not
        allowed, or do not fit, the next larger ones stand for them."""
        bounds = {
            one.division.plan_ngpus: one.bound
            for one in self.tried
            if 0 < one.bound < inf and one.division.micro_batch_size == division.micro_batch_size
        }
        ranks = [ranks for ranks in divisors(division.plan_ngpus) if ranks > 1]
        return min(
            next((bounds[size] for size in sorted(bounds) if size >= division.plan_ngpus // each), inf)
            * (1 + (each - 1) / division.micro_batches)
            for each in ranks
        )

    def _meshes(self, division: Division) -> list[Mesh]:
        _, config = in_division(self.source, self.config, division)
        return config.meshes(self.hardware)

    def _is_over(self, reserved: float) -> bool:
        """Whether there is a plan, and no more time than what is reserved for others."""
        return self._fastest() < inf and self.left() <= reserved

    def _plan(self, one: Tried, meshes: Sequence[Mesh], below: float = inf, plain: bool = True) -> None:
        """Looks for the plan of a division that takes less than `below` seconds.

        plain  of pipelines, whether those whose ranks have devices in equal numbers, on one axis each, or others
        """
        _, config = in_division(self.source, self.config, one.division)
        seconds = min(config.search_seconds, max(self.left(), LEAST_SECONDS))
        if not one.pipeline:
            config = replace(
                config, explore_pipeline=False, pipeline_pivots=(), pipeline_schedule=None, pipeline_nstages=None
            )
        config = replace(config, search_seconds=seconds)
        graph = self.graph(one.division)
        try:
            plan = plan_for(graph, config, self.hardware, self.times, meshes, not one.pipeline, below, plain)
        except NotFaster as slower:
            one.prove(meshes, slower.bound)
            logger.debug("%s on %s: not below %.4g s a step", one.name, meshes[0], below)
        except UserError as refusal:
            one.prove(meshes, inf)
            if one.plan is None:
                if isinstance(refusal, NothingFits):
                    one.needed = refusal.needed
                else:
                    one.refusal = one.refusal or str(refusal)
                logger.info("%s: %s", one.name, one.refusal or "does not fit")
        else:
            one.plan, one.refusal, one.needed = plan, "", None
            one.prove(meshes, plan.bound)
            self.findings.add(self._now(), one.step_seconds)
            logger.info("%s: %.4g s a step", one.name, one.step_seconds)
