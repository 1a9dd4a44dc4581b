"""The categories of a report: what predicted seconds and bytes are for. Their sums are those of the plan."""

from __future__ import annotations

from nnscaler.graph import Block
from nnscaler.operators import operator_of
from nnscaler.operators.registry import contraction_flops
from nnscaler.plan import Key, Plan
from nnscaler.planner.costs import GRADIENTS, STATE, CostModel
from nnscaler.report.collectives import CollectiveCost
from nnscaler.report.parameters import ParameterGroup
from nnscaler.report.spelling import short_name
from nnscaler.units import Unit, divide

MATMUL = "matmul"
MEMORY_BOUND = "memory-bound"
RECOMPUTE = "recompute"
EXPOSED = "communication exposed"
HIDDEN = "communication hidden"
OPTIMIZER = "optimizer"
WORKING = "working memory"
BUFFERS = "communication buffers"
CASTS = "casts of master weights"
COPIES = "copies to the host exposed"
COPIES_HIDDEN = "copies to the host hidden"


def category_of(unit: Unit) -> str:
    """What a unit's time is for: products of matrices, memory traffic, or the name of its registered operator."""
    if unit.kind == "cheap":
        return MEMORY_BOUND
    operator = operator_of(unit.main)
    if operator.flops is contraction_flops:
        return MATMUL
    return short_name(operator.name)


def costs_of(plan: Plan) -> CostModel:
    """The cost model that the plan was priced with."""
    assert isinstance(plan.costs, CostModel), "only a plan that the planner made has costs"
    return plan.costs


def unit_categories(block: Block) -> dict[str, str]:
    """Name of a unit -> its category, for what a block computes itself."""
    return {unit.name: category_of(unit) for unit in divide(block) if unit.kind != "call"}


def seconds_by_category(
    plan: Plan, collectives: list[CollectiveCost], parameters: list[ParameterGroup]
) -> tuple[dict[str, float], float]:
    """({category: seconds of a step}, in order; seconds of communication that computation hides).

    What is computed again counts as `recompute`. What is communicated again counts as communication. Resharding in
    which no other device takes part counts as memory traffic. What an operator's own function exchanges counts as that
    operator.
    """
    unit_of = {(block.name, name): what for block in plan.graph.all_blocks() for name, what in _items(block)}
    own: dict[str, float] = {}
    rest = dict.fromkeys((MEMORY_BOUND, RECOMPUTE, EXPOSED, OPTIMIZER), 0.0)
    for key, value in plan.seconds.items():
        if key.category in ("forward", "backward"):
            what = unit_of[key.block, key.name]
            totals = rest if what in rest else own
            totals[what] = totals.get(what, 0.0) + value * plan.micro_batches
        elif key.category == "again":
            rest[RECOMPUTE] += value * plan.micro_batches
    for one in collectives:
        rest[MEMORY_BOUND if one.local else EXPOSED] += one.seconds - one.hidden
    rest[OPTIMIZER] += sum(group.update_seconds for group in parameters)
    for what, categories in ((CASTS, ("cast", "cast again")), (COPIES, ("copies",))):
        if seconds := sum(value for key, value in plan.seconds.items() if key.category in categories):
            rest[what] = seconds * plan.micro_batches
    first = {MATMUL: own.pop(MATMUL)} if MATMUL in own else {}
    return {**first, **own, **rest}, sum(one.hidden for one in collectives)


def _items(block: Block) -> list[tuple[str, str]]:
    return list(unit_categories(block).items())


def bytes_by_category(plan: Plan, parameters: list[ParameterGroup]) -> dict[str, float]:
    """Category -> bytes of a device, in order: parameters and what training adds to them, then activations."""
    totals: dict[str, float] = {}
    for group in parameters:
        for what, size in group.memory.items():
            totals[what] = totals.get(what, 0.0) + size
    state = sum(totals.get(what, 0.0) for what in STATE)
    if state:
        for what in STATE:
            totals[what] -= plan.state_on_host * totals[what] / state
    if plan.gradients_on_host:
        totals[GRADIENTS] -= plan.gradients_on_host
    for key, size in plan.memory.items():
        if key.category in ("saved", "inside"):
            totals[saved_at(key)] = totals.get(saved_at(key), 0.0) + size
    for what, category in ((WORKING, "working"), (BUFFERS, "buffers")):
        totals[what] = sum(size for key, size in plan.memory.items() if key.category == category)
    return totals


def host_bytes_by_category(plan: Plan) -> dict[str, float]:
    """Category -> bytes of the host's memory, for each device."""
    totals: dict[str, float] = {}
    for key, size in plan.host.items():
        what = {"state": "optimizer state", GRADIENTS: GRADIENTS}.get(key.category) or saved_at(key)
        totals[what] = totals.get(what, 0.0) + size
    return totals


def saved_at(key: Key) -> str:
    """The category of an activation that is kept for backward, by the recompute level of the calls that keep it."""
    return f"activations, {key.detail}"
