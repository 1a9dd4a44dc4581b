"""What limits a plan: where the step's time goes that something could save, and how full memory is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nnscaler.recompute import level_of
from nnscaler.report.categories import CASTS, COPIES, EXPOSED, HIDDEN, MEMORY_BOUND, OPTIMIZER, RECOMPUTE
from nnscaler.report.spelling import gib, percent, seconds

FULL = 0.99  # of the limit: above it a plan says so


def limits_of(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """[{limit, share of the step, text}], with the largest share first. `values`: `predicted` and `costs` of a
    report"""
    predicted = values["predicted"]
    step, by_category = predicted["step_seconds"], predicted["seconds_by_category"]
    arithmetic = {
        name: value
        for name, value in by_category.items()
        if name not in (MEMORY_BOUND, RECOMPUTE, EXPOSED, OPTIMIZER, CASTS, COPIES)
    }
    hidden, exposed = predicted["hidden_seconds"][HIDDEN], by_category[EXPOSED]
    waits = f"{seconds(exposed)} by which computation takes longer; {seconds(hidden)} are hidden behind it"
    found = [
        ("arithmetic", sum(arithmetic.values()), f"{_and(arithmetic)}, at the rates that the device reaches"),
        ("memory bandwidth", by_category[MEMORY_BOUND], "operators that read and write more than they compute"),
        ("communication", exposed, waits if exposed or hidden else "there is none"),
        ("optimizer", by_category[OPTIMIZER], "reading and writing the optimizer's state"),
        ("memory", *_memory(values)),
    ]
    return [
        {"limit": limit, "share": value / step, "text": text}
        for limit, value, text in sorted(found, key=lambda one: -one[1])
    ]


def _memory(values: Mapping[str, Any]) -> tuple[float, str]:
    """(seconds of a step that are spent to hold less memory, a text on how full it is).

    Whether they are spent for the limit's sake is not known: to compute again may also take no longer than all else.

    What is computed again at a level that keeps everything is the fusing compiler's choice, and is not counted.
    """
    used, limit = (values["predicted"][name] for name in ("memory_bytes", "memory_limit_bytes"))
    again = sum(
        level["again_seconds"]
        for block in values["costs"].values()
        for name, level in block["levels"].items()
        if not level_of(name).everything
    )
    again += sum(one["seconds"] for one in values["collectives"] if one["phase"] == "again")
    spent = f"{seconds(again)} of computing and gathering again what is not kept" if again else "nothing is done twice"
    casts, copies = (values["predicted"]["seconds_by_category"].get(what, 0.0) for what in (CASTS, COPIES))
    if casts:
        spent += f", {seconds(casts)} of casting master weights"
    if copies:
        spent += f", {seconds(copies)} of copies to the host and back that nothing hides"
    full = f", {percent(used / limit)} of it" if used > FULL * limit else ""
    away, there = (values["predicted"].get(name, 0.0) for name in ("host_bytes", "host_limit_bytes"))
    full += f", and {gib(away)} of {gib(there)} of the host" if away > FULL * there else ""
    return again + casts + copies, f"{gib(used)} of {gib(limit)} are used{full}; {spent}"


def _and(names: Mapping[str, float]) -> str:
    """The names, as `a, b and c`."""
    words = sorted(names, key=lambda name: -names[name])
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]])) or "nothing"
