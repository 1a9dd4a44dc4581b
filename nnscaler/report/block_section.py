"""The section of plan.html on one block: its recompute levels, its operators and collectives in order, its
parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nnscaler.report.charts import bar, colours, legend, swatch
from nnscaler.report.markup import Markup, table, tag
from nnscaler.report.spelling import gib, or_blank, percent, seconds, short_name

Values = Mapping[str, Any]
_HEAD = ["operator", "split", "layouts in → out", ">forward", ">backward", ">again", ">of the step", ">kept"]


def block_section(name: str, block: Values, values: Values) -> Markup:
    """A heading, then what `nnscaler.report.blocks.block_costs` says of the block. `values`: those of plan.json"""
    calls = f"called {block['calls']} times" if block["calls"] > 1 else "called once"
    return tag(
        "section", tag("h3", name, tag("small", f" {calls}")), *_levels(block), *_pieces(name, values),
        _operators(name, block, values), *_parameters(name, block, values),
    )  # fmt: skip


def _levels(block: Values) -> list[Markup]:
    """A bar of how many calls have which recompute level."""
    if block["calls"] < 2:
        return []
    counts = {level: one["calls"] for level, one in block["levels"].items()}
    return [bar(counts, block["calls"], _calls), legend(counts, block["calls"], _calls)]


def _pieces(name: str, values: Values) -> list[Markup]:
    """What runs in pieces, by the operators that the table shows."""
    pieces = values["blocks"][name]["pieces"]
    if not pieces:
        return []
    units = [unit for unit in values["costs"][name]["units"] if "outputs" in unit]
    shown = {last: next(unit["name"] for unit in units if last in unit["outputs"]) for last in pieces}
    each = [f"those up to {shown[last]} in {count} pieces" for last, count in pieces.items()]
    text = f"Operators run piece by piece: {', '.join(each)}. What this costs is in the last one's row, under again."
    return [tag("p", text, class_="faint")]


def _calls(count: float) -> str:
    return f"{count:.0f} call{'s' if count != 1 else ''}"


def _operators(name: str, block: Values, values: Values) -> Markup:
    """A row for each operator, and below it one for each layout that its results are brought to."""
    step = values["predicted"]["step_seconds"]
    paint = colours(values["predicted"]["seconds_by_category"])
    moves = _moves(name, values)
    rows: list[list[object]] = []
    kinds: list[str] = []

    def add(row: list[object], kind: str = "") -> None:
        rows.append(row)
        kinds.append(kind)

    def move(tensor: str) -> None:
        for (_, layouts), (collectives, time) in moves.pop(tensor, {}).items():
            text = tag("span", f"↳ {tensor}: {collectives}")
            add([text, "", layouts.replace("->", "→"), *_times(time, step), ""], "move")

    made = {tensor for unit in block["units"] for tensor in unit.get("outputs", ())}
    for tensor in [tensor for tensor in moves if tensor not in made]:
        move(tensor)
    for tensor, size in block["given_saved_bytes"].items():
        add([tag("span", f"{tensor}, from outside"), "", "", "", "", "", "", gib(size)], "move")
    for unit in block["units"]:
        if "calls_block" in unit:
            add([tag("span", f"calls of {unit['calls_block']}"), *[""] * 7], "call")
            continue
        what = tag(
            "span", swatch(paint[unit["category"]]), tag("b", unit["name"]),
            tag("small", f" {_operators_of(unit)}", title=f"{unit['module']} {unit['source']}"),
        )  # fmt: skip
        layouts = f"{', '.join(unit['inputs'].values())} → {', '.join(unit['outputs'].values())}"
        times = _times(unit["seconds"], step)
        split = unit["splits"][0] if len(unit["splits"]) == 1 else ""
        add([what, split, layouts, *times, or_blank(unit["saved_bytes"], gib)])
        for tensor in unit["outputs"]:
            move(tensor)
    return table(_HEAD, rows, kinds)


def _operators_of(unit: Values) -> str:
    """The names of the operators in a unit, without namespaces and overloads."""
    names = [short_name(name) for name in unit["operators"]]
    shown = list(dict.fromkeys(names))
    return ", ".join(shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 4 else "")


def _times(time: Values, step: float) -> list[object]:
    """Cells for forward, backward, again (what backward repeats), and the share of the step."""
    three = [time[phase] for phase in ("forward", "backward", "again")]
    return [*(or_blank(value, seconds) for value in three), percent(sum(three) / step)]


def _moves(name: str, values: Values) -> dict[str, dict[tuple[str, str], tuple[str, dict[str, float]]]]:
    """Tensor -> (tensor, layouts) -> the collectives that bring it from one to the other, and their seconds by
    phase."""
    found: dict[str, dict[tuple[str, str], tuple[str, dict[str, float]]]] = {}
    for one in values["collectives"]:
        if one["block"] != name or not one["move"]:
            continue
        of_tensor = found.setdefault(one["what"], {})
        key = (one["what"], one["move"])
        text, time = of_tensor.get(key, ("", dict.fromkeys(("forward", "backward", "again"), 0.0)))
        time[one["phase"]] += one["seconds"]
        if one["collective"] not in text.split(", "):
            text = ", ".join(filter(None, [text, one["collective"]]))
        of_tensor[key] = (text, time)
    return found


def _parameters(name: str, block: Values, values: Values) -> list[Markup]:
    if not block["parameters"]:
        return []
    kinds = list(dict.fromkeys(kind for one in block["parameters"] for kind in one["bytes"]))
    shared = any(one["trained"] and one["owners"] > 1 for one in block["parameters"])
    resharded = {
        one["what"]
        for one in values["collectives"]
        if one["block"] == name and one["phase"] == "backward" and one["move"] and not one["local"]
    }
    rows = [
        [
            one["tensor"] if one["trained"] else f"{one['tensor']} (not trained)", one["count"],
            f"{one['layout']}{', fp32' if one['master_only'] else ''}",
            *((one["owners"], _exchanged(one, one["tensor"] in resharded)) if shared else ()),
            *(or_blank(one["bytes"].get(kind, 0), gib) for kind in kinds),
            or_blank(one["update_seconds"], seconds),
        ]
        for one in block["parameters"]
    ]  # fmt: skip
    exchange = [">ranks with the same shard", "gradient exchanged"] if shared else []
    head = ["parameter", ">how many", "layout", *exchange, *(f">{kind}" for kind in kinds), ">update"]
    text = "fp32: only the master weight is stored, and cast when it is gathered."
    meaning = [tag("p", text, class_="faint")] if any(one["master_only"] for one in block["parameters"]) else []
    return [table(head, rows), *meaning]


def _exchanged(parameter: Values, resharded: bool) -> str:
    """When the ranks that use a parameter add up its gradient.

    resharded  whether collectives of the table above do that
    """
    if not parameter["trained"]:
        return ""
    if parameter["owners"] > 1:
        return "once a step" if parameter["exchanged_once"] else "each micro-batch"
    return "each micro-batch, above" if resharded else "never: one rank uses it"
