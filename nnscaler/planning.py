"""Planning as a configuration asks for it; and, where nothing fits, the nearest changes with which a plan does fit."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import ceil
from typing import Any

from nnscaler.config import ComputeConfig
from nnscaler.errors import UserError
from nnscaler.graph import Graph
from nnscaler.hardware import Hardware
from nnscaler.pipeline.plan import PipelinePlan
from nnscaler.pipeline.search import Wanted, find_pipeline, quiet
from nnscaler.plan import GIB, Plan
from nnscaler.planner import NothingFits, find_plan
from nnscaler.planner.policies import apply_policy
from nnscaler.profiler.operators import OperatorTimes
from nnscaler.source import Source
from nnscaler.trace import trace

logger = logging.getLogger(__name__)

TRYING_SECONDS = 30.0  # of processor time, for all changes that are tried
EACH_SECONDS = 5.0  # for the search of one
FACTORS = (2, 4, 8, 16)  # of devices, and of the sequence's parts: the first that fits is told

Planning = Callable[[], Plan | PipelinePlan]


def plan_for(
    graph: Graph, config: ComputeConfig, hardware: Hardware, times: OperatorTimes | None
) -> Plan | PipelinePlan:
    """The best plan, with or without a pipeline, as the policy has it. Raises UserError where there is none."""
    apply_policy(graph, config.pas_policy, config.plan_ngpus)
    memory = None if config.gpu_mem_constraint is None else config.gpu_mem_constraint * GIB
    fused, seconds, meshes = hardware.name != "CPU", config.search_seconds, config.meshes(hardware)
    host = config.host_bytes(hardware)
    if not config.explore_pipeline:
        return find_plan(
            graph, meshes, hardware, memory=memory, recompute_modules=config.recompute_modules,
            micro_batches=config.micro_batches, fused=fused, times=times, seconds=seconds, host=host,
        )  # fmt: skip
    wanted = Wanted(config.pipeline_pivots, config.pipeline_schedule, config.pipeline_nstages)
    return find_pipeline(
        graph, meshes, hardware, wanted, memory=memory, recompute_modules=config.recompute_modules,
        micro_batches=config.micro_batches, fused=fused, times=times, seconds=seconds, host=host,
    )  # fmt: skip


def what_fits(source: Source, graph: Graph, config: ComputeConfig, hardware: Hardware, refusal: NothingFits) -> str:
    """The nearest changes with which a plan fits, in one line.

    Each of them is really planned, as long as TRYING_SECONDS allow.
    """
    until = time.process_time() + TRYING_SECONDS
    logger.info("no plan fits; looking for the nearest changes with which one does")
    quick = replace(config, search_seconds=min(EACH_SECONDS, config.search_seconds))
    found: dict[str, str] = {}
    for kind, change, plan in _changes(source, graph, quick, hardware, refusal.needed):
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


def _changes(
    source: Source, graph: Graph, config: ComputeConfig, hardware: Hardware, needed: float | None
) -> Iterator[tuple[str, str, Planning]]:
    """(kind, text of the change, how to plan with it); the nearest of each kind comes first."""

    def with_config(**changes: Any) -> Planning:
        return lambda: plan_for(graph, replace(config, **changes), hardware, None)

    def with_source(other: Source) -> Planning:
        model, buffers = other.build()
        return lambda: plan_for(
            trace(model, other.inputs, buffers, config.trace_strategy, other.seed), config, hardware, None
        )

    for name, make in source.instead.items():
        yield name, name, with_source(replace(source, make=make))
    devices, runtime = config.plan_ngpus, config.runtime_ngpus
    for factor in FACTORS:
        plan, run = devices * factor, max(runtime, devices * factor)
        if run % plan == 0:
            text = f"--plan_ngpus {plan} --runtime_ngpus {run}"
            yield "devices", text, with_config(plan_ngpus=plan, runtime_ngpus=run)
    for parts in FACTORS:
        shorter = source.shortened(parts)
        if shorter is not None:
            length = max(tensor.shape[1] for tensor in shorter.inputs.values())
            yield "sequence", f"sequences of {length:,} tokens", with_source(shorter)
    if needed is not None:
        size = ceil(needed / GIB)
        has = "" if needed <= hardware.memory else f", where {hardware.name} has {hardware.memory / GIB:.0f}"
        yield "memory", f"--gpu_mem_constraint {size}{has}", with_config(gpu_mem_constraint=float(size))
    if not config.explore_pipeline and devices > 1 and config.micro_batches > 1:
        yield "pipeline", "--explore_pipeline", with_config(explore_pipeline=True)
