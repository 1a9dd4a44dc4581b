"""A plan's costs as plain values. plan.json holds them beside the plan itself, and all other reports read only these.

schema, units, about: what the file is, and what the plan was made for; see `nnscaler.report.about`

predicted     headline figures, and their parts. `bound_seconds`: no plan of those that were searched takes less, as far
              as is proven; `gap`: by what part of the plan's time that is less
search        the limit of the search, whether it `stopped` there, and if so, what was found within parts of it
limits        what the step's time and the device's memory go into, the most important first
advice        what would help, or would not: measuring; and, where it was asked for, more memory or devices
              (`would_help`)
origins       the share of the step that rests on each kind of figure: measured, profile (bundled), roofline
              (arithmetic)
sources       where the hardware's figures come from
collectives   every collective, and local part of resharding, the longest first
costs         block -> its operators, levels and parameters; see `nnscaler.report.blocks.block_costs`

Seconds are those of an optimizer step, and bytes those of a device. Equal inputs give equal values: nothing depends on
the time or the place.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nnscaler.errors import UserError
from nnscaler.plan import Plan
from nnscaler.report.about import SCHEMA
from nnscaler.report.blocks import block_costs
from nnscaler.report.categories import (
    HIDDEN,
    bytes_by_category,
    costs_of,
    host_bytes_by_category,
    seconds_by_category,
)
from nnscaler.report.certificate import certificate, search_of
from nnscaler.report.collectives import collective_costs
from nnscaler.report.limits import limits_of
from nnscaler.report.origins import measuring, origins_of
from nnscaler.report.parameters import parameter_groups
from nnscaler.report.would_help import Replan, would_help

PLAN = "plan.json"


@dataclass(frozen=True)
class Work:
    """What a micro-batch is, for figures of speed.

    tokens  how many it has
    flops   its forward and backward operations: with attention counted in full, and with what its masks leave
    peak    FLOP/s of a device by its data sheet; None: not known, so there is no MFU
    """

    tokens: int
    flops: tuple[float, float]
    peak: float | None


def plan_report(plan: Plan, work: Work | None = None, replan: Replan | None = None) -> dict[str, Any]:
    """The plan and its costs as plain values, with floats of six digits.

    work    what a micro-batch is, for tokens a second and MFU; None: without these
    replan  plans the same model with a changed configuration, to find what would help; None: this is not asked
    """
    costs = costs_of(plan)
    parameters = parameter_groups(plan, costs)
    collectives = collective_costs(plan, costs, parameters)
    seconds, hidden = seconds_by_category(plan, collectives, parameters)
    values = plan.to_json()
    values["predicted"] = {
        "step_seconds": plan.step_seconds,
        "memory_bytes": plan.memory_bytes,
        "memory_limit_bytes": plan.memory_limit,
        **certificate(plan),
        "device_memory_bytes": costs.hardware.memory,
        **speed_of(plan.step_seconds / plan.micro_batches * plan.mesh.plan_ngpus, work),
        "seconds_by_category": seconds,
        "hidden_seconds": {HIDDEN: hidden},
        "bytes_by_category": bytes_by_category(plan, parameters),
        **(_host(plan) if plan.host_limit else {}),
    }
    values |= search_of(plan)
    values["costs"] = {block.name: block_costs(plan, block, parameters) for block in plan.graph.all_blocks()}
    values["collectives"] = [
        {**asdict(one), "local": one.local} for one in sorted(collectives, key=lambda one: -one.seconds)
    ]
    values["limits"] = limits_of(values)
    values["origins"] = origins_of(values)
    timed = costs.times is not None or costs.hardware.name == "CPU"  # where no operator is timed
    values["advice"] = [*(would_help(plan, replan) if replan else ()), *measuring(values, timed)]
    values["sources"] = {
        "hardware": costs.hardware.source,
        "profile": costs.hardware.profile.source,
        "measured": costs.hardware.measured.source,
    }
    return rounded(values)


def _host(plan: Plan) -> dict[str, Any]:
    """What lies in the host's memory, and the seconds of a step's copies that computation hides."""
    exposed = sum(value for key, value in plan.seconds.items() if key.category == "copies")
    return {
        "host_bytes": plan.host_bytes,
        "host_limit_bytes": plan.host_limit,
        "host_bytes_by_category": host_bytes_by_category(plan),
        "hidden_copies_seconds": max(0.0, sum(plan.copies.values()) - exposed) * plan.micro_batches,
    }


def speed_of(device_seconds: float, work: Work | None) -> dict[str, float]:
    """Tokens a second for each device, and MFU: a micro-batch's operations over what its devices could do in its time.

    device_seconds  a micro-batch's time, times the devices of a copy
    """
    if work is None:
        return {}
    speed = {
        "tokens_per_second_per_gpu": work.tokens / device_seconds,
        "micro_batch_flops": work.flops[0],
        "micro_batch_flops_causal": work.flops[1],
    }
    if work.peak is not None:
        full, causal = (flops / device_seconds / work.peak for flops in work.flops)
        speed |= {"mfu": full, "mfu_causal": causal}
    return speed


def rounded(value: Any) -> Any:
    """The value, in which each float has six digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, (list, tuple)) else value


def read_plan(path: Path) -> dict[str, Any]:
    """The values of the plan.json in a compiled directory, or of a plan.json itself. Raises UserError for anything
    else."""
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
