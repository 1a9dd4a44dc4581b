"""How good a plan is proven to be, how long it was searched for, and what a looser limit of that time bought."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nnscaler.pipeline.plan import PipelinePlan
from nnscaler.plan import Plan
from nnscaler.report.markup import Markup, table, tag
from nnscaler.report.spelling import percent, seconds, three_digits

EXACT = 5e-5  # a gap below it is none
Values = Mapping[str, Any]


def certificate(plan: Plan | PipelinePlan) -> dict[str, float]:
    """`bound_seconds`: no plan of those that `proven` names takes less; `gap`: by what part of its time it is less."""
    return {"bound_seconds": plan.bound, "gap": plan.gap}


def search_of(plan: Plan | PipelinePlan) -> dict[str, Any]:
    """{"search": how it was searched for}, where that is known."""
    return {} if plan.searched is None else {"search": plan.searched.to_json()}


def proven(values: Values) -> str:
    """How near to the best the plan is proven to be, and among which, as a clause."""
    gap, bound = values["predicted"]["gap"], values["predicted"]["bound_seconds"]
    if gap >= 1:
        return "nothing is proven: time was out"
    none = f"no {_others(values)} takes less"
    least = none if gap < EXACT else f"{none} than {seconds(bound)}, which is {percent(gap, 2)} less"
    return f"{least}: so long its busiest rank works" if "pipeline" in values else least


def _others(values: Values) -> str:
    """The plans among which it is near to the best."""
    divided = " that divides the batch like this" if "divisions" in values else ""
    if "pipeline" in values:
        return f"pipeline of these stages, with this schedule{divided},"
    return "plan of this stage, in its memory," if "stage" in values else f"plan without a pipeline{divided}"


def sentences(values: Values) -> str:
    """What is proven, and whether the search's limit ended it."""
    return " ".join(f"{clause[0].upper()}{clause[1:]}." for clause in [proven(values), *_ended(values)])


def search_lines(values: Values) -> list[str]:
    """The same in one line, and what looser limits bought in another."""
    bought = [f"within {limit} {step or beside}" for limit, step, beside in _rows(values)]
    return ["; ".join([proven(values), *_ended(values)]), *([", ".join(bought)] if bought else [])]


def search_section(values: Values) -> list[Markup]:
    """What looser limits bought, for plan.html; nothing where the search did not end at its limit."""
    rows = _rows(values)
    if not rows:
        return []
    head = [">search of", ">a step", "beside the plan"]
    note = "Seconds of the search are those of one core; --search_seconds sets their limit."
    text = table(head, [list(row) for row in rows]), tag("p", note, class_="faint")
    return [tag("section", tag("h2", "What a looser limit of the search bought"), *text)]


def _ended(values: Values) -> Iterator[str]:
    """Whether the search's limit ended it, as a clause; nothing where that is not known."""
    if "search" in values:
        limit = limited(values["search"]["limit_seconds"])
        done = f"the search was done within its limit of {limit}, so that a looser one buys nothing"
        yield f"the search ended at its limit of {limit}" if values["search"]["stopped"] else done


def _rows(values: Values) -> list[list[str]]:
    """[limit, what was found within it, how that is beside the plan], where the limit ended the search."""
    found = values.get("search", {}).get("found_within", [])
    return [[limited(row["limit_seconds"]), *_beside(row["step_seconds"], values)] for row in found]


def _beside(step: float | None, values: Values) -> tuple[str, str]:
    if step is None:
        return "", "no plan yet"
    slower = step / values["predicted"]["step_seconds"] - 1
    return seconds(step), f"{percent(slower)} slower" if slower >= 5e-4 else "as fast"


def limited(value: float) -> str:
    """A limit of time, such as `40 s` or `2.50 s`."""
    return f"{value:.0f} s" if value == round(value) else f"{three_digits(value)} s"
