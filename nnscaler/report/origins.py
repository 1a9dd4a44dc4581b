"""Where predicted seconds come from, and what should be measured so that more of them are known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nnscaler.report.categories import OPTIMIZER
from nnscaler.report.spelling import percent

MEASURE_COMMUNICATION = "torchrun --nproc_per_node=<devices> -m nnscaler.profiler.benchmark_comm"


def origins_of(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """[{what, origin, seconds, share}], largest first: which parts of the step rest on which kind of figure.

    origin   "measured", "profile" or "roofline" (see `nnscaler.hardware.Timing`)
    seconds  of a device's work in a step, including what is hidden behind other work
    share    seconds over the step's time
    """
    totals: dict[tuple[str, str], float] = {}
    for what, origin, seconds in _each(values):
        totals[what, origin] = totals.get((what, origin), 0.0) + seconds
    step = values["predicted"]["step_seconds"]
    return [
        {"what": what, "origin": origin, "seconds": seconds, "share": seconds / step}
        for (what, origin), seconds in sorted(totals.items(), key=lambda item: -item[1])
        if seconds
    ]


def _each(values: Mapping[str, Any]) -> Iterator[tuple[str, str, float]]:
    for block in values["costs"].values():
        for unit in block["units"]:
            if "category" in unit:
                yield unit["category"], unit["origin"], sum(unit["seconds"].values())
    for one in values["collectives"]:
        yield one["collective"], one["origin"], one["seconds"]
    yield OPTIMIZER, "roofline", values["predicted"]["seconds_by_category"][OPTIMIZER]


def measuring(values: Mapping[str, Any], timed: bool) -> list[dict[str, Any]]:
    """[{change, helps, text}]: what to measure next, of computation and of communication.

    timed  whether everything has been timed that can be, of computation
    """
    collectives = {one["collective"] for one in values["collectives"]}
    unmeasured = [one for one in values["origins"] if one["origin"] != "measured" and one["share"] >= 0.01]
    advice = []
    computed = [one for one in unmeasured if one["what"] not in collectives]
    if computed and not timed:
        share, origin = percent(computed[0]["share"]), computed[0]["origin"]
        text = (
            f"{share} of the step's time rests on a {origin} figure: planning where the device is present measures it"
        )
        advice.append({"change": f"profile {computed[0]['what']}", "helps": True, "text": text})
    moved = [one for one in unmeasured if one["what"] in collectives]
    if moved:
        share = sum(one["share"] for one in moved)
        text = f"{percent(share)} of the step's time rests on unmeasured communication: {MEASURE_COMMUNICATION}"
        advice.append({"change": "profile communication", "helps": True, "text": text})
    return advice
