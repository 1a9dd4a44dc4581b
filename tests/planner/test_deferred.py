"""Gradients of gathered weights that wait for their exchange, by hand: layers of three products, and one product after
the last, on two devices that store halves of each weight."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nnscaler.compiler import Source
from nnscaler.hardware import load_hardware
from nnscaler.mesh import Mesh
from nnscaler.placement import Shard
from nnscaler.plan import Key
from nnscaler.planner.costs import CostModel
from nnscaler.planner.deferred import Deferred, When
from nnscaler.planner.price import price
from nnscaler.planner.problem import Decision, Recomputing, build_problem
from nnscaler.planner.program import Program, Solution
from nnscaler.planner.statement import Terms
from nnscaler.recompute import KEEPS_ALL, RECOMPUTES_ALL
from nnscaler.trace import trace

WIDTH, CALLS = 16, 3
WEIGHT = WIDTH * WIDTH * 4  # bytes of a layer's, in fp32
EACH = WEIGHT + WEIGHT // 2  # whole, as it is sent, and the half that comes


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.products = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for product in self.products:
            x = nn.functional.silu(product(x))
        return x


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH, bias=False)
        self.layers = nn.ModuleList(Layer() for _ in range(CALLS))
        self.last = nn.Linear(WIDTH, 4 * WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.last(x).sum()


def in_halves(decision: Decision) -> int:
    """Of weights, and of the rows of what is computed."""
    return next((o for o, one in enumerate(decision.options) if one.outputs[0] == (Shard(0),)), 0)


def state(frozen: str = "") -> tuple[Program, Solution]:
    """`frozen`: what the names of weights without gradients begin or end with"""
    inputs = {"x": torch.empty((8, WIDTH), dtype=torch.bfloat16, device="meta")}
    model, buffers = Source(Model, inputs).build()
    for name, weight in model.named_parameters():
        weight.requires_grad_(not frozen or not (name.startswith(frozen) or name.endswith(frozen)))
    costs = CostModel(load_hardware("h100"), Mesh((2,)))
    problem = build_problem(trace(model, inputs, buffers), costs, Recomputing(), 1)
    levels = {"model": {KEEPS_ALL: 1}, "layer": {KEEPS_ALL: CALLS}}
    return Program(problem), Solution([in_halves(one) for one in problem.decisions], levels)


@pytest.fixture
def stated() -> tuple[Program, Solution]:
    return state()


def test_they_are_held_while_operators_run(stated, monkeypatch):
    """While the last product's is exchanged; and without that, in the call that runs backward first."""
    working = []
    for nothing in ("of_last", "during"):
        working.append(price(Program(stated[0].problem), stated[1]).memory[Key("working")])
        monkeypatch.setattr(Deferred, nothing, lambda *args: [])
    working.append(price(Program(stated[0].problem), stated[1]).memory[Key("working")])
    product = 2 * (WIDTH * WIDTH + 2 * 4 * WIDTH)  # its weight, and half of the rows that it takes and makes
    last = 2 * (4 * WIDTH * WIDTH + 4 * (WIDTH + 4 * WIDTH))
    free = 2 * 2 * 4 * WIDTH  # what the silu after it, and the last product, read
    assert working == [last + 4 * EACH, product - free + 4 * EACH, last]


def value_of(terms: Terms, program: Program, solution: Solution) -> float:
    values = program.statement.values(program.values(solution))
    assert values is not None
    return sum(values[variable] * factor for variable, factor in terms)


def test_those_of_two_weights_wait_and_in_the_first_call_the_last_one_s(stated):
    program, solution = stated
    problem = program.problem
    kept = [(program.n["layer"][KEEPS_ALL], WEIGHT / 2)]  # as much as if the calls had kept so much each
    deferred = Deferred(program.flows, "layer", {None: [], RECOMPUTES_ALL: kept})
    after = Deferred(program.flows, "model", {None: []})

    def found(terms: Terms) -> float:
        return value_of(terms, program, solution)

    assert found(deferred.during(When.LATER)) == found(deferred.during(When.LATER, RECOMPUTES_ALL)) == 2 * EACH
    assert found(deferred.during(When.FIRST)) == 4 * EACH
    assert found(deferred.during(When.FIRST, RECOMPUTES_ALL)) == 4 * EACH - CALLS * WEIGHT / 2
    assert deferred.during(When.IN_PIECES) == deferred.during(When.IN_PIECES, RECOMPUTES_ALL) == []
    units = {(one.block, one.name): (index, one) for index, one in enumerate(problem.decisions) if one.kind == "unit"}
    products = sorted(
        one.place
        for (block, name), (_, one) in units.items()
        if block == "layer" and one.options[0].ways[0][0].startswith("products")
    )
    assert [deferred.when(place) for place in products] == [When.LATER, When.FIRST, When.FIRST]
    of_units = {name: found(after.of_last(index)) for (block, name), (index, _) in units.items() if block == "model"}
    assert {name: size for name, size in of_units.items() if size} == {"last": 4 * EACH}


@pytest.mark.parametrize(("frozen", "of_layers", "of_first", "of_last"), [
    ("layers", 0, 4 * EACH, 4 * EACH), ("last", 2 * EACH, 2 * EACH, 0),
])  # fmt: skip
def test_weights_that_are_not_trained_have_none(frozen, of_layers, of_first, of_last):
    """They are gathered all the same."""
    program, solution = state(frozen)
    deferred = Deferred(program.flows, "layer", {None: []})
    after = Deferred(program.flows, "model", {None: []})
    terms = [deferred.during(when) for when in (When.LATER, When.FIRST)]
    terms.append([term for index in range(len(program.problem.decisions)) for term in after.of_last(index)])
    assert [value_of(each, program, solution) for each in terms] == [of_layers, of_first, of_last]


class Between(Model):
    """Something is computed of each layer's result, before the next layer and after the last."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = nn.functional.silu(layer(x))
        return nn.functional.silu(self.last(x)).sum()


def test_what_backward_reads_before_that_of_any_layer():
    """The last layer's result, and what is made after it; not what other layers give, though something reads it. And
    which weights are used after the last layer."""
    inputs = {"x": torch.empty((8, WIDTH), dtype=torch.bfloat16, device="meta")}
    model, buffers = Source(Between, inputs).build()
    problem = build_problem(
        trace(model, inputs, buffers), CostModel(load_hardware("h100"), Mesh((1,))), Recomputing(), 1
    )
    of_root = [flow for flow in problem.flows if flow.block == problem.root]
    made_by = {flow.tensor: problem.decisions[flow.producer[0]] for flow in of_root}
    read = [flow.tensor for flow in of_root if flow.needed]
    first = [flow.tensor for flow in of_root if flow.freed_first]
    assert [made_by[name].kind for name in read] == ["input", *["output"] * CALLS, "unit", "unit"]
    assert first == read[-3:], "the last call's result, silu's of it, and the product of that"
    assert [flow.tensor for flow in of_root if flow.used_last] == ["last_weight"]
