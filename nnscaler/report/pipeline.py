"""What a pipeline costs and why: the values of its plan.json, and its page.

predicted  headline figures of a step; memory is that of the rank that needs most
pipeline   the schedule; what crosses between stages; parameters of several stages; for each rank, the share of the step
           in which it computes; and the simulated step, as a list of [rank, kind of work, stage, micro-batch, begin,
           end] with times in seconds
stages     the report of each stage, as if it were a model of its own; see `nnscaler.report.values`
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import pairwise
from typing import Any

from nnscaler.graph import TensorMeta
from nnscaler.later import weight_seconds
from nnscaler.pipeline.plan import PipelinePlan, forward_seconds, update_seconds
from nnscaler.placement import format_placements
from nnscaler.plan import Plan
from nnscaler.report.about import facts
from nnscaler.report.certificate import certificate, search_of, search_section, sentences
from nnscaler.report.charts import headline
from nnscaler.report.divisions import division_section
from nnscaler.report.markup import Markup, table, tag
from nnscaler.report.spelling import gib, seconds
from nnscaler.report.text import recompute
from nnscaler.report.timeline import timeline
from nnscaler.report.values import Work, plan_report, rounded, speed_of
from nnscaler.report.would_help import Replan, advice_tables, would_help
from nnscaler.schedules import Schedule

Values = Mapping[str, Any]


def pipeline_report(plan: PipelinePlan, work: Work | None = None, replan: Replan | None = None) -> dict[str, Any]:
    """The plan and its costs as plain values, floats with six digits. `work` and `replan`: see `plan_report`"""
    first, schedule, step = plan.stages[0], plan.schedule, plan.step_seconds
    devices = plan.mesh.plan_ngpus
    values: dict[str, Any] = {
        "model": first.graph.root.module_type,
        "mesh": first.mesh.to_json(),
        "hardware": first.hardware,
        "micro_batches": schedule.micro_batches,
        "predicted": {
            "step_seconds": step,
            "update_seconds": plan.update_seconds,
            "memory_bytes": plan.memory_bytes,
            "memory_limit_bytes": plan.memory_limit,
            **({"host_bytes": plan.host_bytes, "host_limit_bytes": plan.host_limit} if plan.host_bytes else {}),
            **certificate(plan),
            **speed_of(step / schedule.micro_batches * devices, work),
        },
        "pipeline": {
            "schedule": asdict(schedule),
            "crossing": [
                _crossing(sender, receiver, sent)
                for (sender, receiver), sent in zip(pairwise(plan.stages), plan.crossing, strict=True)
            ],
            "shared": plan.shared,
            "splits": plan.splits,
            "stages": [
                {
                    "rank": schedule.rank_of(index),
                    "blocks": {block.name: stage.graph.count(block) for block in stage.graph.blocks.values()},
                    "forward_seconds": forward_seconds(stage),
                    "backward_seconds": sum(stage.seconds.values()) - forward_seconds(stage) - update_seconds(stage),
                    "later_seconds": weight_seconds(stage),
                    "in_flight": plan.in_flight[index],
                    "memory_bytes": stage.memory_bytes,
                    "host_bytes": stage.host_bytes,
                }
                for index, stage in enumerate(plan.stages)
            ],
            "computing": [plan.timeline.busy(rank) / step for rank in range(schedule.ranks)],
            "timeline": [
                [span.rank, span.work.kind, span.work.stage, span.work.micro_batch, span.start, span.end]
                for span in plan.timeline.spans
            ],
        },
    }
    values |= search_of(plan)
    values["advice"] = would_help(plan, replan) if replan else []
    return {**rounded(values), "stages": [plan_report(stage) for stage in plan.stages]}


def _crossing(sender: Plan, receiver: Plan, tensors: Mapping[str, TensorMeta]) -> list[dict[str, Any]]:
    """The tensors that a stage sends to the next: whole, and how the devices of both have them."""
    sent, received = sender.graph.root, receiver.graph.root
    before = dict(zip(sent.outputs, sender.outputs[sent.name]))
    after = dict(zip(received.inputs, receiver.inputs[received.name]))
    return [
        {
            "name": name,
            "whole": list(meta.shape),
            "dtype": str(meta.dtype).removeprefix("torch."),
            "gradient": meta.requires_grad,
            "sent": format_placements(before[name]),
            "received": format_placements(after[name]),
        }
        for name, meta in tensors.items()
    ]


def pipeline_sections(values: Values, name: str) -> Iterator[Markup]:
    """The body of the page."""
    predicted, pipeline = values["predicted"], values["pipeline"]
    yield tag("h1", name)
    yield facts(values, f"The pipeline: {Schedule(**pipeline['schedule'])}. {sentences(values)}")
    yield headline(predicted, f"memory a device, of {gib(predicted['memory_limit_bytes'])}")
    yield tag("section", tag("h2", "Timeline of a step"), *timeline(values))
    rows = [
        [
            tag("a", f"stage {index}", href=stage_page(index)), stage["rank"],
            ", ".join(f"{count} {name}" for name, count in stage["blocks"].items()),
            seconds(stage["forward_seconds"]), seconds(stage["backward_seconds"]),
            seconds(stage["later_seconds"]) if stage["later_seconds"] else "", stage["in_flight"],
            gib(stage["memory_bytes"]), gib(stage["host_bytes"]) if stage["host_bytes"] else "",
            "; ".join(recompute(report)),
            ", ".join(f"{one['name']} {one['whole']}, {one['sent']}" for one in sent),
        ]
        for index, (stage, report, sent) in enumerate(
            zip(pipeline["stages"], values["stages"], [*pipeline["crossing"], []], strict=True)
        )
    ]  # fmt: skip
    head = ["stage", ">rank", "blocks", ">forward", ">backward", ">later", ">in flight", ">memory", ">host",
            "recompute", "sends"]  # fmt: skip
    note = (
        "Seconds are those of a micro-batch; later: those of backward's second part, for weights, where it has two. "
        "What is sent has its layout there. Each stage has a page of its own."
    )
    yield from division_section(values)
    yield from search_section(values)
    yield tag("section", tag("h2", "Stages"), table(head, rows), tag("p", note, class_="faint"))
    if values["advice"]:
        yield tag("section", tag("h2", "What would help"), *advice_tables(values["advice"]))
    shared = [f"{name}: stages {', '.join(map(str, users))}" for name, users in pipeline["shared"].items()]
    if shared:
        yield tag("section", tag("h2", "Parameters of several stages"), tag("p", "; ".join(shared)))


def of_stage(values: Values, index: int) -> dict[str, Any]:
    """The values for the page of one stage."""
    stage = {"index": index, "of_step_seconds": values["predicted"]["step_seconds"]}
    return {**values["stages"][index], "about": values["about"], "stage": stage}


def stage_page(index: int) -> str:
    """The name of the file with the page of one stage."""
    return f"plan_stage{index}.html"
