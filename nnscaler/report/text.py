"""The short version of a report: a screenful of text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nnscaler.report.about import plan_title, work_of
from nnscaler.report.certificate import search_lines
from nnscaler.report.divisions import division_lines
from nnscaler.report.spelling import gib, percent, seconds
from nnscaler.report.spelling import step as step_text
from nnscaler.report.would_help import apart
from nnscaler.schedules import Schedule

SHOWN = 4  # collectives that are named


def explain(values: Mapping[str, Any]) -> str:
    """A screenful of lines on a plan; for a pipeline, a few and one for each stage. `values`: those of plan.json"""
    if "pipeline" in values:
        return _explain_pipeline(values)
    predicted = values["predicted"]
    step, limit = predicted["step_seconds"], predicted["memory_limit_bytes"]
    lines = [
        f"plan       {plan_title(values)}",
        f"step       {step_text(predicted)}",
        f"           for {work_of(values)}, a copy",
        *_listed("time", predicted["seconds_by_category"], step, seconds),
        *(f"           {what:<30} {seconds(value):>9}" for what, value in predicted["hidden_seconds"].items() if value),
        f"memory     {gib(predicted['memory_bytes'])} of {gib(limit)} that the plan may use",
        *_listed("", predicted["bytes_by_category"], limit, gib),
        *_host(predicted),
        *(f"recompute  {text}" for text in recompute(values)),
        *_named("fp8", in_fp8(values)),
        *_named("search", search_lines(values)),
        *_named("divisions", division_lines(values)),
        *_named("exposed", exposed(values)),
        *_named("limits", [f"{one['limit']}, {percent(one['share'])}: {one['text']}" for one in main_limits(values)]),
        *_advice(values),
    ]
    return "\n".join(lines)


def _host(predicted: Mapping[str, Any]) -> list[str]:
    if not predicted.get("host_bytes"):
        return []
    limit = predicted["host_limit_bytes"]
    hidden = predicted["hidden_copies_seconds"]
    behind = f"; copies of {seconds(hidden)} a step are hidden behind computation" if hidden else ""
    return [
        f"host       {gib(predicted['host_bytes'])} of {gib(limit)} a device that the plan may use{behind}",
        *_listed("", predicted["host_bytes_by_category"], limit, gib),
    ]


def _explain_pipeline(values: Mapping[str, Any]) -> str:
    predicted, pipeline = values["predicted"], values["pipeline"]
    computing = ", ".join(percent(share) for share in pipeline["computing"])
    used, limit = predicted["memory_bytes"], predicted["memory_limit_bytes"]
    away, host = (predicted.get(what, 0.0) for what in ("host_bytes", "host_limit_bytes"))
    return "\n".join(
        [
            f"plan       {plan_title(values)}",
            f"schedule   {Schedule(**pipeline['schedule'])}",
            f"step       {step_text(predicted)}",
            f"           for {work_of(values)}, a copy",
            f"           {seconds(predicted['update_seconds'])} of it update parameters; ranks compute {computing}",
            f"memory     {gib(used)} of {gib(limit)} that the plan may use, on the rank that needs most",
            *_named("host", [f"{gib(away)} of {gib(host)} a device that the plan may use, likewise"] if away else []),
            *_named("search", search_lines(values)),
            *_named("divisions", division_lines(values)),
            *(f"{f'stage {index}':<10} {line}" for index, line in enumerate(_stage_lines(values))),
            *_advice(values),
        ]
    )


def _stage_lines(values: Mapping[str, Any]) -> Iterator[str]:
    for stage, report in zip(values["pipeline"]["stages"], values["stages"], strict=True):
        blocks = ", ".join(f"{count} {name}" for name, count in stage["blocks"].items())
        again = "; ".join(["", *recompute(report)])
        later = f", {seconds(stage['later_seconds'])} of it later" if stage["later_seconds"] else ""
        away = f" and {gib(stage['host_bytes'])} of the host" if stage["host_bytes"] else ""
        yield (
            f"rank {stage['rank']}: {blocks}; forward {seconds(stage['forward_seconds'])}, "
            f"backward {seconds(stage['backward_seconds'])}{later}; {gib(stage['memory_bytes'])}{away}, "
            f"{stage['in_flight']} in flight{again}"
        )


def _advice(values: Mapping[str, Any]) -> Iterator[str]:
    for label, changes in zip(("would help", "would not"), apart(values["advice"]), strict=True):
        yield from _named(label, [f"{one['change']}: {one['text']}" for one in changes])


def recompute(values: Mapping[str, Any]) -> list[str]:
    """A line for each block that is called several times: its calls by level, what is computed in pieces, and how many
    of its weights are stored as master weights alone."""
    pieces = {name: block["pieces"].items() for name, block in values["blocks"].items()}
    return [
        f"{name}: "
        + ", ".join(f"{level['calls']} {what}" for what, level in block["levels"].items())
        + "".join(f"; up to {last} in {count} pieces" for last, count in pieces[name])
        + _master_only(block["parameters"])
        for name, block in values["costs"].items()
        if block["calls"] > 1
    ]


def in_fp8(values: Mapping[str, Any]) -> list[str]:
    """Where products in fp8 were asked for: a line for each block that has any, and of weights that are gathered so; or
    one that says that none has."""
    if values.get("about", {}).get("precision") != "fp8":
        return []
    found = {name: sum(node["in_fp8"] for node in block["nodes"].values()) for name, block in values["blocks"].items()}
    gathered = {name: len(block["gathered_in_fp8"]) for name, block in values["blocks"].items()}
    lines = [
        f"{name}: {count} products multiply in fp8"
        + f"; {gathered[name]} weights gathered in it" * bool(gathered[name])
        for name, count in found.items()
        if count
    ]
    return lines or ["no product is faster in fp8 than in bf16"]


def _master_only(parameters: Sequence[Mapping[str, Any]]) -> str:
    count = sum(one["master_only"] for one in parameters)
    return f"; {count} of {len(parameters)} weights stored in fp32 alone" if count else ""


def transfer(one: Mapping[str, Any]) -> str:
    """A collective, in one line."""
    hidden = f", {percent(one['hidden'] / one['seconds'])} of it hidden" if one["hidden"] else ""
    what = f"{one['collective']} of {one['block']}.{one['what']} ({one['phase']}) over {one['devices']}"
    size = f"{one['calls']:.0f} x {gib(one['size'])}"
    return f"{what}: {size}, {seconds(one['seconds'])}{hidden} ({one['origin']})"


def exposed(values: Mapping[str, Any]) -> list[str]:
    """A line for each of the collectives that computation waits for longest, and one for all others that it waits
    for."""
    waits = [(one["seconds"] - one["hidden"], one) for one in values["collectives"] if not one["local"]]
    waits = sorted((pair for pair in waits if pair[0] > 0), key=lambda pair: -pair[0])
    rest = [wait for wait, _ in waits[SHOWN:]]
    more = [f"{len(rest)} more: computation waits {seconds(sum(rest))} for them"] if rest else []
    return [*(transfer(one) for _, one in waits[:SHOWN]), *more]


def main_limits(values: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The limits that matter: memory always, and others from 1 % of the step."""
    return [one for one in values["limits"] if one["share"] >= 0.01 or one["limit"] == "memory"]


def _listed(label: str, parts: Mapping[str, float], whole: float, write: Any) -> list[str]:
    shown = [f"{what:<30} {write(value):>9}  {percent(value / whole):>7}" for what, value in parts.items() if value]
    return _named(label, shown)


def _named(label: str, lines: list[str]) -> list[str]:
    """The lines, with a label before the first of them."""
    return [f"{'' if index else label:<10} {line}" for index, line in enumerate(lines)]
