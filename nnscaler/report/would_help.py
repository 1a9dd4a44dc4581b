"""What would help: the same model is planned again, with more memory or more devices."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from nnscaler.errors import UserError
from nnscaler.pipeline.plan import PipelinePlan
from nnscaler.plan import GIB, Plan
from nnscaler.report.markup import Markup, table, tag
from nnscaler.report.spelling import gib

logger = logging.getLogger(__name__)

MORE_MEMORY = 20  # GiB
NEARLY_FULL = 0.9  # of the host's memory: a plan that uses more of it may want more
NO_GAIN = "no faster"
AnyPlan = Plan | PipelinePlan
Change = dict[str, Any]  # field of ComputeConfig -> its value
Replan = Callable[[Change], AnyPlan]


def would_help(plan: AnyPlan, replan: Replan) -> list[dict[str, Any]]:
    """[{change, helps, step_seconds, devices, speed, text}]. Each change has really been planned.

    replan  plans the same graph with a changed configuration
    speed   samples a second, relative to this plan's
    helps   whether these are more
    """
    advice = []
    changes = list(_changes(plan))
    for number, (change, what) in enumerate(changes, 1):
        logger.info("what would help, %d of %d: planning with %s", number, len(changes), what)
        try:
            found = replan(change)
        except UserError as error:
            advice.append({"change": what, "helps": False, "text": str(error)})
            continue
        advice.append(_compared(what, plan, found))
    return advice


def _changes(plan: AnyPlan) -> Iterator[tuple[Change, str]]:
    devices, replicas = plan.mesh.plan_ngpus, plan.mesh.replicas
    yield {"gpu_mem_constraint": plan.memory_limit / GIB + MORE_MEMORY}, f"+{MORE_MEMORY} GiB a device"
    if plan.host_bytes > NEARLY_FULL * plan.host_limit:
        yield {"host_mem_constraint": 2 * plan.host_limit / GIB}, f"+{gib(plan.host_limit)} of the host a device"
    more = f"+{devices * replicas} device{'s' if devices * replicas > 1 else ''}"
    yield (
        {"plan_ngpus": 2 * devices, "runtime_ngpus": 2 * devices * replicas},
        f"{more}, each copy split over {2 * devices}",
    )
    yield {"runtime_ngpus": 2 * devices * replicas}, f"{more}, in {2 * replicas} copies"


def _compared(what: str, plan: AnyPlan, found: AnyPlan) -> dict[str, Any]:
    speed = (plan.step_seconds / plan.mesh.replicas) / (found.step_seconds / found.mesh.replicas)
    devices = found.mesh.runtime_ngpus / plan.mesh.runtime_ngpus
    each = "" if devices == 1 else f" ({speed / devices:.2f} x a device)"
    samples = "" if found.mesh.replicas == plan.mesh.replicas else " of twice the samples"
    gain = f"{speed:.3g} x as fast{each}" if abs(speed - 1) >= 5e-4 else NO_GAIN
    return {
        "change": what,
        "helps": speed > 1 and gain != NO_GAIN,
        "step_seconds": found.step_seconds,
        "devices": found.mesh.runtime_ngpus,
        "speed": speed,
        "text": f"{gain}: {found.step_seconds:.4g} s a step{samples}, {found.memory_bytes / GIB:.1f} GiB a device",
    }


def apart(advice: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """The changes that help, and those that do not."""
    return [one for one in advice if one.get("helps", True)], [one for one in advice if not one.get("helps", True)]


def advice_tables(advice: Sequence[Mapping[str, Any]]) -> list[Markup]:
    """For a page: a table of the changes that help, and one of those that do not."""
    heads = (["what would help", "by how much"], ["what would not help", "why"])
    return [
        table(head, [[tag("b", one["change"]), one["text"]] for one in changes])
        for head, changes in zip(heads, apart(advice), strict=True)
        if changes
    ]
