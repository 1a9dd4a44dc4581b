"""What would help: the same model is planned again, with more memory or more devices."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

from nnscaler.errors import UserError
from nnscaler.pipeline.plan import PipelinePlan
from nnscaler.plan import GIB, Plan

logger = logging.getLogger(__name__)

MORE_MEMORY = 20  # GiB
AnyPlan = Plan | PipelinePlan
Change = dict[str, Any]  # field of ComputeConfig -> its value
Replan = Callable[[Change], AnyPlan]


def would_help(plan: AnyPlan, replan: Replan) -> list[dict[str, Any]]:
    """[{change, step_seconds, devices, speed, text}]. Each change has really been planned.

    replan  plans the same graph with a changed configuration
    speed   samples a second, relative to this plan's
    """
    advice = []
    for change, what in _changes(plan):
        logger.info("what would help: planning with %s", what)
        try:
            found = replan(change)
        except UserError as error:
            advice.append({"change": what, "text": str(error)})
            continue
        advice.append(_compared(what, plan, found))
    return advice


def _changes(plan: AnyPlan) -> Iterator[tuple[Change, str]]:
    devices, replicas = plan.mesh.plan_ngpus, plan.mesh.replicas
    yield {"gpu_mem_constraint": plan.memory_limit / GIB + MORE_MEMORY}, f"+{MORE_MEMORY} GiB a device"
    yield (
        {"plan_ngpus": 2 * devices, "runtime_ngpus": 2 * devices * replicas},
        f"+{devices * replicas} devices, each copy split over {2 * devices}",
    )
    yield {"runtime_ngpus": 2 * devices * replicas}, f"+{devices * replicas} devices, in {2 * replicas} copies"


def _compared(what: str, plan: AnyPlan, found: AnyPlan) -> dict[str, Any]:
    speed = (plan.step_seconds / plan.mesh.replicas) / (found.step_seconds / found.mesh.replicas)
    devices = found.mesh.runtime_ngpus / plan.mesh.runtime_ngpus
    each = "" if devices == 1 else f" ({speed / devices:.2f} x a device)"
    samples = "" if found.mesh.replicas == plan.mesh.replicas else " of twice the samples"
    gain = f"{speed:.3g} x as fast{each}" if abs(speed - 1) >= 5e-4 else "no faster"
    return {
        "change": what,
        "step_seconds": found.step_seconds,
        "devices": found.mesh.runtime_ngpus,
        "speed": speed,
        "text": f"{gain}: {found.step_seconds:.4g} s a step{samples}, {found.memory_bytes / GIB:.1f} GiB a device",
    }
