"""What a plan was made for, said in the same words on plan.html, in plan.json and at the head of generated code.

Equal inputs give equal words: nothing here depends on the time, the computer or the folder.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from nnscaler.report.markup import Markup, tag
from nnscaler.report.spelling import devices, gib, seconds, step

Values = Mapping[str, Any]

SCHEMA = 2  # of plan.json; it changes when names in the file change their meaning
UNITS = {
    "*_seconds, seconds": "seconds of an optimizer step on a device, for all calls and micro-batches",
    "seconds in pipeline.stages": "seconds of one micro-batch",
    "seconds in pipeline.timeline": "seconds from the beginning of a step",
    "limit_seconds in search": "processor seconds",
    "predicted.step_seconds in stages": "seconds in which a stage computes in a step, without waiting for others",
    "*_bytes, bytes, size": "bytes of a device",
    "tokens_per_second_per_gpu": "tokens trained on in a second, for each device",
    "micro_batch_flops": "operations of a micro-batch's forward and backward, with attention in full",
    "micro_batch_flops_causal": "the same with what masks leave of attention",
    "mfu_causal": "model FLOPs utilisation: operations over what the device could do at its data sheet's peak, with "
    "what masks leave of attention, and within documents alone where they are kept apart",
    "document_length": "tokens of the document in which a token stands, on average, which attention's times are for",
    "mfu": "the same by the document's formula, which counts attention in full",
    "share, gap": "part of a step's time, from 0 to 1",
    "layout": "for each axis in mesh.names: S(d) sharded along dimension d, R whole, R* whole with a term of its "
    "gradient, P a term of a sum",
}  # fmt: skip


def headed(values: Values, about: Values) -> dict[str, Any]:
    """The values of a plan.json, headed by the schema, the units, and what the plan was made for."""
    return {"schema": SCHEMA, "units": UNITS, "about": dict(about), **values}


def model_of(values: Values) -> str:
    """The name by which people know the model."""
    return str(values.get("about", {}).get("model") or values["model"])


def plan_title(values: Values) -> str:
    """A title, such as `Meta-Llama-3-8B on 2 copies x 8 devices of H200`."""
    return f"{model_of(values)} on {devices(values)} of {values['hardware']}"


def work_of(values: Values) -> str:
    """What a copy does in a step, such as `4 micro-batches of 1 sequence of 8,192 tokens, in bf16`, as far as it is
    known."""
    about = values.get("about", {})
    batches = _several(values["micro_batches"], "micro-batch", "micro-batches")
    sequences = ""
    if "sequence_length" in about:
        count = _several(about["sequences_per_micro_batch"], "sequence", "sequences")
        sequences = f" of {count} of {about['sequence_length']:,} tokens"
        if "document_length" in about:
            sequences += f" in documents of {about['document_length']:,}"
    precision = f", in {about['precision']}" if "precision" in about else ""
    if about.get("products_in_fp8") == 0:
        precision = ", in bf16, as no product is faster in fp8"
    return f"{batches}{sequences}{precision}"


def versions_of(values: Values) -> str:
    """Versions, such as `torch 2.11.0, transformers 5.0.0`."""
    return ", ".join(f"{name} {version}" for name, version in values.get("about", {}).get("versions", {}).items())


def facts(values: Values, remark: str) -> Markup:
    """The paragraph of plan.html that says what the plan is for. `remark`: a sentence at its end"""
    first = f"Each copy trains {work_of(values)}, a step."
    if "stage" in values:
        first = f"Stage {values['stage']['index']} of a pipeline. {first}"
    lines = [tag("span", first)]
    if values.get("about", {}).get("command"):
        words = re.split(r" (?=--)", values["about"]["command"])  # a line is not broken within a flag
        lines.append(tag("code", *(part for word in words for part in (tag("span", word), " "))))
    if versions_of(values):
        lines.append(tag("span", versions_of(values)))
    return tag("p", *lines, tag("span", f"All figures are predictions. {remark}"), class_="about")


def code_facts(values: Values, stage: int | None = None) -> Iterator[tuple[str, str]]:
    """The facts at the head of generated code, as (what, text).

    stage  the index of the stage whose code it is; None: the plan has no pipeline
    """
    predicted = values["predicted"]
    yield "model", model_of(values) + ("" if model_of(values) == values["model"] else f" as {values['model']}")
    yield "step", f"{work_of(values)}, a copy"
    yield "mesh", f"{devices(values)} of {values['hardware']}"
    yield "predicted", f"{step(predicted)}, {gib(predicted['memory_bytes'])} a device"
    if stage is not None:
        own = values["stages"][stage]["predicted"]
        works = (
            f"it works for {seconds(own['step_seconds'])} of the step, and takes {gib(own['memory_bytes'])} of a device"
        )
        yield "stage", f"{stage} of {len(values['stages'])}, counted from 0; {works}"
    if values.get("about", {}).get("command"):
        yield "command", values["about"]["command"]
    if versions_of(values):
        yield "versions", versions_of(values)


def _several(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"
