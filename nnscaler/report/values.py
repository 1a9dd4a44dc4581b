"""A plan's costs as plain values, which plan.json holds beside the plan itself; the other reports read nothing else.

schema, units, about: what the file is, and what the plan was made for; see `nnscaler.report.about`

predicted     headline figures, and what they are made of; `gap`: the part of its time by which the plan may be slower
              than the best on the meshes that were tried, as far as was proven
limits        what the step's time and the device's memory go into, most important first
advice        what would help: by measuring, and, where it was asked for, by planning again (see `would_help`)
origins       share of the step by what says how long it takes: measured, profile (bundled), roofline (arithmetic)
sources       where the hardware's figures come from
collectives   every collective, and local step of resharding, longest first
costs         block -> its operators, levels and parameters

Seconds are those of an optimizer step, bytes those of a device. Equal inputs give equal values: no time, no place.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nnscaler.errors import UserError
from nnscaler.plan import Key, Plan
from nnscaler.report.about import SCHEMA
from nnscaler.report.blocks import block_costs
from nnscaler.report.categories import (
    HIDDEN,
    bytes_by_category,
    costs_of,
    host_bytes_by_category,
    seconds_by_category,
)
from nnscaler.report.limits import limits_of
from nnscaler.report.origins import measuring, origins_of
from nnscaler.report.parameters import parameter_groups
from nnscaler.report.transfers import all_transfers
from nnscaler.report.would_help import Replan, would_help

PLAN = "plan.json"


@dataclass(frozen=True)
class Work:
    """What a micro-batch is, for figures of speed.

    tokens  that it has
    flops   forward and backward operations of it: attention counted in full, and halved by causality
    peak    FLOP/s of a device by its data sheet; None: not known, so that there is no MFU
    """

    tokens: int
    flops: tuple[float, float]
    peak: float | None


def plan_report(plan: Plan, work: Work | None = None, replan: Replan | None = None) -> dict[str, Any]:
    """The plan and its costs as plain values, floats with six digits.

    work    for tokens a second and MFU; None: without
    replan  plans the same model with a changed configuration, to say what would help; None: that is not asked
    """
    costs = costs_of(plan)
    parameters = parameter_groups(plan, costs)
    transfers = all_transfers(plan, costs, parameters)
    seconds, hidden = seconds_by_category(plan, transfers, parameters)
    values = plan.to_json()
    values["predicted"] = {
        "step_seconds": plan.step_seconds,
        "memory_bytes": plan.memory_bytes,
        "memory_limit_bytes": plan.memory_limit,
        "gap": plan.gap,
        "device_memory_bytes": costs.hardware.memory,
        **speed_of(plan.step_seconds / plan.micro_batches * plan.mesh.plan_ngpus, work),
        "seconds_by_category": seconds,
        "hidden_seconds": {HIDDEN: hidden},
        "bytes_by_category": bytes_by_category(plan, parameters),
        **(_host(plan) if plan.host_limit else {}),
    }
    values["costs"] = {block.name: block_costs(plan, block, parameters) for block in plan.graph.all_blocks()}
    values["collectives"] = [
        {**asdict(one), "local": one.local} for one in sorted(transfers, key=lambda one: -one.seconds)
    ]
    values["limits"] = limits_of(values)
    values["origins"] = origins_of(values)
    values["advice"] = [*(would_help(plan, replan) if replan else ()), *measuring(values)]
    values["sources"] = {
        "hardware": costs.hardware.source,
        "profile": costs.hardware.profile.source,
        "measured": costs.hardware.measured.source,
    }
    return rounded(values)


def _host(plan: Plan) -> dict[str, Any]:
    """What lies in the host's memory, and the seconds of copying there and back that computation hides."""
    kept = (Key("copies", "", side) for side in ("forward", "backward"))  # those of the optimizer's state are exposed
    exposed = sum(plan.seconds.get(key, 0.0) for key in kept)
    return {
        "host_bytes": plan.host_bytes,
        "host_limit_bytes": plan.host_limit,
        "host_bytes_by_category": host_bytes_by_category(plan),
        "hidden_copies_seconds": max(0.0, sum(plan.copies.values()) - exposed) * plan.micro_batches,
    }


def speed_of(device_seconds: float, work: Work | None) -> dict[str, float]:
    """Tokens a second and device, and the fraction of the peak: operations of a micro-batch over what its devices
    could do in its time. `device_seconds`: a micro-batch's time, times its devices."""
    if work is None:
        return {}
    speed = {"tokens_per_second_per_gpu": work.tokens / device_seconds}
    if work.peak is not None:
        full, causal = (flops / device_seconds / work.peak for flops in work.flops)
        speed |= {"mfu": full, "mfu_causal": causal}
    return speed


def rounded(value: Any) -> Any:
    """The value with six digits of each float in it."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, (list, tuple)) else value


def read_plan(path: Path) -> dict[str, Any]:
    """The values in a compiled directory, or in a plan.json. Raises UserError for what is neither."""
    file = path / PLAN if path.is_dir() else path
    try:
        values: dict[str, Any] = json.loads(file.read_text())
        values["predicted"]["step_seconds"]
        if values["schema"] == SCHEMA:
            return values
    except OSError:
        raise UserError(
            f"'{path}' is no compiled plan: it has no {PLAN}; train.py --run_mode compile makes one"
        ) from None
    except (ValueError, TypeError, KeyError):
        raise UserError(f"'{file}' is not a plan with its costs; compile again") from None
    raise UserError(f"'{file}' has schema {values['schema']}, and this version reads {SCHEMA}; compile again")
