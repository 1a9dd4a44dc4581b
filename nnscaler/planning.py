"""Planning as a configuration asks for it; and, where nothing fits, the nearest changes with which a plan does fit."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import ceil, inf
from typing import Any, TypeAlias

from nnscaler.config import ComputeConfig
from nnscaler.errors import UserError
from nnscaler.graph import Graph
from nnscaler.hardware import Hardware
from nnscaler.mesh import Mesh
from nnscaler.pipeline.plan import PipelinePlan
from nnscaler.pipeline.search import Wanted, find_pipeline, quiet
from nnscaler.plan import GIB, Plan
from nnscaler.planner import NothingFits, find_plan, least_step
from nnscaler.planner.policies import apply_policy
from nnscaler.profiler.operators import OperatorTimes
from nnscaler.source import Source
from nnscaler.sums import gradient_sum
from nnscaler.trace import allow_fp8, trace

logger = logging.getLogger(__name__)

TRYING_SECONDS = 20.0  # of processor time, for all changes that are tried
EACH_SECONDS = 3.0  # for the search of one
FACTORS = (2, 4, 8, 16)  # of devices, and of the sequence's parts: the first that fits is told

AnyPlan: TypeAlias = Plan | PipelinePlan
Planning = Callable[[], AnyPlan]


def plan_for(
    graph: Graph,
    config: ComputeConfig,
    hardware: Hardware,
    times: OperatorTimes | None,
    meshes: Sequence[Mesh] | None = None,
    alone: bool = True,
    below: float = inf,
    plain: bool | None = None,
    decided: bool = True,
) -> AnyPlan:
    """The best plan, with or without a pipeline, as the policy has it.

    meshes  that are tried; default: all of the configuration
    alone   where pipelines are explored, whether a plan without one will do too
    below   seconds of a step; only a plan that takes less is wanted
    plain   of pipelines, which: see `nnscaler.pipeline.search.Wanted`
    decided whether a plan is sought, where there is none when time is out, until it is known whether one fits

    Raises UserError where there is none, and NotFaster where none takes less than `below`.
    """
    apply_policy(graph, config.pas_policy, config.plan_ngpus)
    meshes = config.meshes(hardware) if meshes is None else meshes
    given = {**_given(config, hardware, times), "seconds": config.search_seconds, "below": below}
    if not config.explore_pipeline:
        return find_plan(graph, meshes, hardware, decided=decided, **given)
    wanted = Wanted(config.pipeline_pivots, config.pipeline_schedule, config.pipeline_nstages, alone, plain)
    return find_pipeline(graph, meshes, hardware, wanted, **given)


def traced(source: Source, strategy: str) -> Graph:
    """The graph of what is compiled. Raises UserError where it cannot be traced, or there is nothing to train."""
    started = time.perf_counter()
    graph = _graph_of(source, strategy)
    if not any(parameter.requires_grad for parameter in graph.parameters.values()):
        raise UserError(
            f"what {graph.root.module_type} returns gives no parameter a gradient: there is nothing to train"
        )
    logger.info(
        "traced %s in %.1f s: %d operators in %d blocks",
        graph.root.module_type, time.perf_counter() - started,
        sum(len(block.nodes) for block in graph.all_blocks()), len(graph.all_blocks()),
    )  # fmt: skip
    return graph


def _graph_of(source: Source, strategy: str) -> Graph:
    model, buffers = source.build()
    graph = trace(model, source.inputs, buffers, strategy, source.seed)
    if source.fp8:
        allow_fp8(graph, source.fp8_keep_bf16)
    return graph


def plan_or_advise(
    source: Source, graph: Graph, config: ComputeConfig, hardware: Hardware, times: OperatorTimes | None
) -> AnyPlan:
    """The best plan. Raises UserError, with the nearest changes with which a plan does fit, where none fits."""
    try:
        return plan_for(graph, config, hardware, times)
    except NothingFits as refusal:
        raise UserError(f"{refusal}; {what_fits(source, graph, config, hardware, refusal)}") from None


def bound_for(
    graph: Graph, config: ComputeConfig, hardware: Hardware, times: OperatorTimes | None, mesh: Mesh | None = None
) -> float:
    """Seconds of a step that no plan on a mesh (default: on one axis), without a pipeline, takes less than. Raises
    UserError where none fits, or the policy has none."""
    apply_policy(graph, config.pas_policy, config.plan_ngpus)
    return least_step(graph, mesh or config.meshes(hardware)[0], hardware, **_given(config, hardware, times))


def _given(config: ComputeConfig, hardware: Hardware, times: OperatorTimes | None) -> dict[str, Any]:
    """What every search is told."""
    return {
        "memory": None if config.gpu_mem_constraint is None else config.gpu_mem_constraint * GIB,
        "recompute_modules": config.recompute_modules,
        "micro_batches": config.micro_batches,
        "fused": hardware.name != "CPU",
        "times": times,
        "host": config.host_bytes(hardware),
        "sums": gradient_sum(config.grad_reduce_dtype, config.runtime_ngpus, hardware.devices_per_node),
    }


def what_fits(source: Source, graph: Graph, config: ComputeConfig, hardware: Hardware, refusal: NothingFits) -> str:
    """The nearest changes with which a plan fits, in one line.

    Each of them is really planned, as long as TRYING_SECONDS allow.
    """
    until = time.process_time() + TRYING_SECONDS
    logger.info("no plan fits; looking for the nearest changes with which one does")
    quick = replace(config, search_seconds=min(EACH_SECONDS, config.search_seconds))
    found: dict[str, str] = {}
    for kind, change, plan in _changes(source, graph, quick, hardware, refusal, found):
        if kind in found:
            continue
        if time.process_time() > until:
            break
        try:
            with quiet("planner", "pipeline"):
                fitting = plan()
        except UserError as error:
            logger.debug("%s: %s", change, error)
            continue
        found[kind] = f"{change} ({fitting.step_seconds:.3g} s a step, {fitting.memory_bytes / GIB:.1f} GiB a device)"
    return f"what would fit: {'; '.join(found.values())}" if found else "no change that was tried fits"


def _soon_planned(graph: Graph, config: ComputeConfig, hardware: Hardware) -> AnyPlan:
    """A plan with a change. Raises UserError where none is found soon.

    Meshes on which it would not fit though choices were made in parts are not searched: that is known at once.
    """
    if config.explore_pipeline:
        return plan_for(graph, config, hardware, None, decided=False)
    first, *others = config.meshes(hardware)
    while True:
        try:
            bound_for(graph, config, hardware, None, first)
        except NothingFits:
            if not others:
                raise
            first, *others = others
        else:
            return plan_for(graph, config, hardware, None, [first, *others], decided=False)


def _changes(
    source: Source,
    graph: Graph,
    config: ComputeConfig,
    hardware: Hardware,
    refusal: NothingFits,
    found: Mapping[str, str],
) -> Iterator[tuple[str, str, Planning]]:
    """(kind, text of the change, how to plan with it); the nearest of each kind comes first.

    found  the kinds of which one fits, as far as is known when the next change is asked for
    """

    def with_config(**changes: Any) -> Planning:
        return lambda: _soon_planned(graph, replace(config, **changes), hardware)

    def with_source(other: Source, **changes: Any) -> Planning:
        graph_of = partial(_graph_of, other, config.trace_strategy)
        return lambda: _soon_planned(graph_of(), replace(config, **changes), hardware)

    instead = {name: replace(source, make=make) for name, make in source.instead.items()}
    for name, other in instead.items():
        yield name, name, with_source(other)
    if hardware.host is not None and config.offload == "off":
        yield "host", "--offload auto", with_config(offload="auto")
        for name, other in instead.items():
            if name not in found:  # neither is enough alone
                yield "host", f"{name} --offload auto", with_source(other, offload="auto")
    elif hardware.host is not None:
        given, usual = config.host_bytes(hardware), replace(config, host_mem_constraint=None).host_bytes(hardware)
        size, there = ceil((usual if given < usual else 2 * given) / GIB), hardware.host.memory / GIB
        has = "" if size <= there else f", where the host of {hardware.name} has {there:.0f}"
        yield "host", f"--host_mem_constraint {size}{has}", with_config(host_mem_constraint=float(size))
    if refusal.needed is not None and (size := ceil(refusal.needed / GIB)) * GIB <= hardware.memory:
        yield "memory", f"--gpu_mem_constraint {size}", with_config(gpu_mem_constraint=float(size))
    devices, runtime = config.plan_ngpus, config.runtime_ngpus
    for factor in FACTORS:
        plan, run = devices * factor, max(runtime, devices * factor)
        if run % plan == 0:
            text = f"--plan_ngpus {plan} --runtime_ngpus {run}"
            yield "devices", text, with_config(plan_ngpus=plan, runtime_ngpus=run)
    for parts in FACTORS if not refusal.at_any_length else ():
        shorter = source.shortened(parts)
        if shorter is not None:
            length = max(tensor.shape[1] for tensor in shorter.inputs.values())
            yield "sequence", f"sequences of {length:,} tokens", with_source(shorter)
    if not config.explore_pipeline and devices > 1 and config.micro_batches > 1:
        yield "pipeline", "--explore_pipeline", with_config(explore_pipeline=True)
