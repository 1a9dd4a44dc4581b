"""plan.html: a plan in one file, for a browser. It needs no scripts and no network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nnscaler.report.about import facts, plan_title
from nnscaler.report.block_section import block_section
from nnscaler.report.categories import COPIES_HIDDEN, HIDDEN
from nnscaler.report.certificate import search_section, sentences
from nnscaler.report.charts import bar, headline, legend, mark
from nnscaler.report.divisions import division_section
from nnscaler.report.markup import Markup, table, tag
from nnscaler.report.pipeline import pipeline_sections
from nnscaler.report.spelling import LEGEND, gib, or_blank, percent, seconds
from nnscaler.report.would_help import advice_tables

Values = Mapping[str, Any]


def plan_page(values: Values) -> str:
    """The HTML of a plan. `values`: those of its plan.json"""
    style = Markup(Path(__file__).with_name("style.css").read_text())
    name = plan_title(values)
    sections = pipeline_sections(values, name) if "pipeline" in values else _sections(values, name)
    head = tag("head", Markup('<meta charset="utf-8"/>'), tag("title", name), tag("style", style))
    body = tag("body", tag("main", *sections))
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


def _sections(values: Values, name: str) -> Iterator[Markup]:
    yield tag("h1", name)
    yield facts(values, sentences(values))
    if "stage" in values:
        whole = seconds(values["stage"]["of_step_seconds"])
        yield headline(values["predicted"], "memory a device", f"work of this stage, in a step of {whole}")
    else:
        yield headline(values["predicted"], "memory a device")
    yield _time(values["predicted"])
    yield _memory(values["predicted"])
    yield from _host(values["predicted"])
    yield from division_section(values)
    yield from search_section(values)
    yield _advice(values)
    yield _notation(values)
    for block, costs in values["costs"].items():
        yield block_section(block, costs, values)
    yield _collectives(values)
    yield _origins(values)


def _time(predicted: Values) -> Markup:
    parts, step = predicted["seconds_by_category"], predicted["step_seconds"]
    hidden = {
        HIDDEN: (predicted["hidden_seconds"].get(HIDDEN, 0.0), "communication behind backward"),
        COPIES_HIDDEN: (predicted.get("hidden_copies_seconds", 0.0), "copies to the host and back beside computation"),
    }
    hidden = {name: one for name, one in hidden.items() if one[0]}
    behind = [bar({name: value}, max(step, value), seconds) for name, (value, _) in hidden.items()]
    if hidden:
        said = ", and ".join(f"{seconds(value)} of {what}" for value, what in hidden.values())
        behind.append(tag("p", f"Below the bar: {said}.", class_="faint"))
    return tag("section", tag("h2", "Time of a step"), bar(parts, step, seconds), *behind, legend(parts, step, seconds))


def _memory(predicted: Values) -> Markup:
    parts, limit = predicted["bytes_by_category"], predicted["memory_limit_bytes"]
    whole = max(predicted["device_memory_bytes"], limit, predicted["memory_bytes"])
    text = f"{gib(predicted['memory_bytes'])} of the {gib(limit)} that the plan may use; a device has "
    return tag(
        "section",
        tag("h2", "Memory of a device"),
        tag("div", bar(parts, whole, gib), mark(limit / whole, f"limit {gib(limit)}"), class_="marked"),
        tag("p", text + gib(predicted["device_memory_bytes"]) + ". Shares are of the limit.", class_="faint"),
        legend(parts, limit, gib),
    )


def _host(predicted: Values) -> list[Markup]:
    if not predicted.get("host_bytes"):
        return []
    parts, limit = predicted["host_bytes_by_category"], predicted["host_limit_bytes"]
    text = f"{gib(predicted['host_bytes'])} a device of the {gib(limit)} that the plan may use."
    if parts.keys() & {"optimizer state", "gradients"}:
        text += " Tables of parameters below count gradients and the optimizer's state wherever they lie."
    heading = tag("h2", "Memory of the host")
    return [tag("section", heading, bar(parts, limit, gib), tag("p", text, class_="faint"), legend(parts, limit, gib))]


def _advice(values: Values) -> Markup:
    limits = table(
        ["what limits", ">of the step", "why"],
        [[tag("b", one["limit"]), percent(one["share"]), one["text"]] for one in values["limits"]],
    )
    planned = any("speed" in one for one in values["advice"])
    note = [] if planned else [tag("p", "Compile with --explain to plan with more memory and devices.", class_="faint")]
    return tag(
        "section",
        tag("h2", "What limits the plan, and what would help"),
        limits,
        *advice_tables(values["advice"]),
        *note,
    )


def _notation(values: Values) -> Markup:
    """What the placements in the tables below mean."""
    axes = values["mesh"]["names"]
    several = f" A tensor has one placement for each axis of the mesh: {', '.join(axes)}." if len(axes) > 1 else ""
    entries = (tag("li", tag("code", name), f" {meaning}") for name, meaning in LEGEND.items())
    return tag(
        "section",
        tag("h2", "Operators, block by block"),
        tag("ul", *entries, class_="notation"),
        tag(
            "p",
            "Split is the annotated name along which the work is divided: *1 is dimension 1, counted from 0, of those "
            "that * stands for in an annotation, and - is none. Times are those of a step, for all calls and "
            "micro-batches; again is what backward computes once more. Kept is what backward needs of the results."
            f"{several}",
            class_="faint",
        ),
    )


def _collectives(values: Values) -> Markup:
    rows = [
        [
            tag("b", one["collective"]), f"{one['block']}.{one['what']}", one["phase"], _move(one),
            one["devices"],
            f"{one['calls']:.0f}", gib(one["size"]), seconds(one["seconds"]), or_blank(one["hidden"], seconds),
            one["origin"],
        ]
        for one in values["collectives"]
        if not one["local"]
    ]  # fmt: skip
    head = ["collective", "of", "when", "layouts", ">devices", ">calls a step", ">bytes a call",
            ">time a step", ">hidden of it", "origin"]  # fmt: skip
    return tag("section", tag("h2", "Communication"), table(head, rows) if rows else tag("p", "There is none."))


def _move(one: Values) -> str:
    """The layouts that a collective brings a tensor from and to. Its gradient goes the other way in backward."""
    layouts = one["move"].split(" -> ")
    return " → ".join(layouts[::-1] if one["phase"] == "backward" else layouts)


def _origins(values: Values) -> Markup:
    rows = [[one["what"], one["origin"], seconds(one["seconds"]), percent(one["share"])] for one in values["origins"]]
    sources = [
        tag("li", tag("b", {"hardware": "roofline"}.get(name, name)), f": {text}")
        for name, text in values["sources"].items()
        if text
    ]
    return tag(
        "section",
        tag("h2", "Where the figures come from"),
        tag("p", "Measured here, in the bundled profile of the hardware, or computed from its rates (roofline)."),
        table(["what", "origin", ">time", ">of the step"], rows),
        tag("ul", *sources),
    )
